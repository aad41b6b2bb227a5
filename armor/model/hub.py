"""The Hugging Face hub: a model's files, or all but its weights with their headers. Every refusal is one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from armor.core.errors import ArmorError
from armor.format.holes import Hole
from armor.model.source import UNWANTED, WANTED

__all__ = ["download", "first_line", "headers"]

SAID = ("README.md", "LICENSE*", "NOTICE*")  # what it says of itself
WEIGHTS = ".safetensors"


def download(name: str, revision: str | None, weights: bool = True) -> Path:
    """The folder of the hub's model `name`, on this machine; without `weights`, all else. Raises ArmorError."""
    from huggingface_hub import snapshot_download

    wanted = [pattern for pattern in (*WANTED, *SAID) if weights or not pattern.endswith(WEIGHTS)]
    with _asking(name, revision):
        return Path(snapshot_download(repo_id=name, revision=revision, allow_patterns=wanted, ignore_patterns=UNWANTED))
    raise AssertionError  # `_asking` lets no error pass


def headers(name: str, revision: str | None) -> dict[str, dict[str, Hole]]:
    """The tensors of each safetensors file of the hub's model `name`, from the first bytes of each.

    Raises ArmorError, as for a header that is no safetensors header.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    found: dict[str, dict[str, Hole]] = {}
    with _asking(name, revision):
        client = HfApi()
        files = [file.rfilename for file in client.model_info(name, revision=revision).siblings or ()]
        unwanted = tuple(pattern.removesuffix("*") for pattern in UNWANTED[1:])
        for file in files:
            if "/" in file or not file.endswith(WEIGHTS) or file.startswith(unwanted):
                continue
            try:
                read = client.parse_safetensors_file_metadata(name, file, revision=revision)
            except (NotASafetensorsRepoError, SafetensorsParsingError, ValueError, KeyError) as error:
                raise ArmorError(f"hub model {name}: {file}: no safetensors header ({first_line(error)})") from error
            places = {key: (tensor.data_offsets, tensor) for key, tensor in read.tensors.items()}
            found[file] = {
                key: Hole(tensor.dtype, tensor.shape, end - begin)
                for key, ((begin, end), tensor) in sorted(places.items(), key=lambda item: item[1][0])
            }
    return found


@contextlib.contextmanager
def _asking(name: str, revision: str | None) -> Iterator[None]:
    """Whatever the hub's client raises becomes one line."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
        return
    except ArmorError:
        raise
    except GatedRepoError:
        reason = "its owner wants you to accept terms; do so on its page, then log in with `hf auth login`"
    except RevisionNotFoundError:
        reason = f"it has no revision {revision}"
    except RepositoryNotFoundError:
        reason = "there is no such model, or it is private; check the name, or log in with `hf auth login`"
    except HFValidationError as error:
        reason = f"not a valid name ({first_line(error)})"
    except OSError as error:
        reason = f"cannot be downloaded ({first_line(error)}); check network and disk, or give a folder"
    except Exception as error:  # the hub's client passes on whatever its network library raises
        reason = f"{type(error).__name__}: {first_line(error)}; check the network, or give a folder"
    raise ArmorError(f"hub model {name}: {reason}")


def first_line(error: Exception) -> str:
    """The first line of what an error says that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
