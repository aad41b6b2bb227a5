"""A model before it is here: a folder with its config.json, its tokenizer, and safetensors files that are holes.

It serves whoever reads headers alone: `armor.model.inspect`, and the stages' estimates of memory and size. A model on
the hub is not downloaded for it, but for the first bytes of each of its files. Of a GGUF file the metadata are read. A
package has to be downloaded, for the Python index gives no part of one.
"""

from __future__ import annotations

from pathlib import Path

from armor.config.sources import ModelSettings
from armor.core.errors import ArmorError, one_line
from armor.format.holes import Hole, write_holes
from armor.format.shards import DTYPES, SINGLE
from armor.model.fetch import check_folder, fill, gguf_dtype
from armor.model.hub import asking, download
from armor.model.source import UNWANTED

__all__ = ["outline"]


def outline(settings: ModelSettings, folder: Path) -> Path:
    """The folder of the model that `settings` names: its own where it is one, else `folder`, which is empty.

    Raises ArmorError where `armor fetch` would, but for what only the weights can show.
    """
    place = Path(settings.folder) if settings.folder else folder
    if settings.hub is not None:
        for file in download(settings.hub, settings.revision, weights=False).iterdir():
            if file.is_file():
                (folder / file.name).symlink_to(file.resolve())
        for name, tensors in _headers(settings.hub, settings.revision).items():
            (folder / name).unlink(missing_ok=True)  # the real one, of an earlier download
            write_holes(folder / name, tensors)
    elif settings.folder is None:
        fill(settings, folder, _outline_gguf)
    check_folder(place)
    return place


def _headers(name: str, revision: str | None) -> dict[str, dict[str, Hole]]:
    """The tensors of each safetensors file of the hub's model `name`, from the first bytes of each.

    Raises ArmorError, as for a header that is no safetensors header.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    found: dict[str, dict[str, Hole]] = {}
    with asking(name, revision):
        client = HfApi()
        files = [file.rfilename for file in client.model_info(name, revision=revision).siblings or ()]
        unwanted = tuple(pattern.removesuffix("*") for pattern in UNWANTED[1:])
        for file in files:
            if "/" in file or not file.endswith(".safetensors") or file.startswith(unwanted):
                continue
            try:
                read = client.parse_safetensors_file_metadata(name, file, revision=revision)
            except (NotASafetensorsRepoError, SafetensorsParsingError, ValueError, KeyError) as error:
                raise ArmorError(f"hub model {name}: {file}: no safetensors header ({one_line(error)})") from error
            places = {key: (tensor.data_offsets, tensor) for key, tensor in read.tensors.items()}
            found[file] = {
                key: Hole(tensor.dtype, tensor.shape, end - begin)
                for key, ((begin, end), tensor) in sorted(places.items(), key=lambda item: item[1][0])
            }
    return found


def _outline_gguf(file: Path, folder: Path, dtype: str) -> None:
    """What `armor fetch` makes of a GGUF model, but for the numbers."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**place)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    kept, tied = gguf_dtype(dtype), set(model.all_tied_weights_keys or ())
    code, width = next((code, width) for code, (name, width) in DTYPES.items() if name == kept)
    tensors = {
        name: Hole(code, tuple(tensor.shape), tensor.numel() * width)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    config.dtype = kept
    config.save_pretrained(folder)
    write_holes(folder / SINGLE, tensors)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
