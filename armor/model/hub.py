"""The Hugging Face hub: a model's files, or all but its weights. Every refusal is one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from armor.core.errors import ArmorError, one_line
from armor.model.source import UNWANTED, WANTED

__all__ = ["asking", "download"]

SAID = ("README.md", "LICENSE*", "NOTICE*")  # what it says of itself


def download(name: str, revision: str | None, weights: bool = True) -> Path:
    """The folder of the hub's model `name`, on this machine; without `weights`, all else. Raises ArmorError."""
    from huggingface_hub import snapshot_download

    wanted = [pattern for pattern in (*WANTED, *SAID) if weights or pattern != "*.safetensors"]
    with asking(name, revision):
        return Path(snapshot_download(repo_id=name, revision=revision, allow_patterns=wanted, ignore_patterns=UNWANTED))
    raise AssertionError  # `asking` lets no error pass


@contextlib.contextmanager
def asking(name: str, revision: str | None) -> Iterator[None]:
    """Whatever the hub's client raises in the block becomes one line about the model `name`. Raises ArmorError."""
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
        reason = f"not a valid name ({one_line(error)})"
    except OSError as error:
        reason = f"cannot be downloaded ({one_line(error)}); check network and disk, or give a folder"
    except Exception as error:  # the hub's client passes on whatever its network library raises
        reason = f"{type(error).__name__}: {one_line(error)}; check the network, or give a folder"
    raise ArmorError(f"hub model {name}: {reason}")
