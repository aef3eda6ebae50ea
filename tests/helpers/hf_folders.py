"""Tools for Hugging Face folders in tests of conversion: read, change and write one again."""

import json
import shutil
from pathlib import Path

from safetensors import safe_open

INDEX = "model.safetensors.index.json"


def save_file(*args, **kwargs):
    """`safetensors.torch.save_file`, imported late: without torch the tests are skipped."""
    from safetensors.torch import save_file

    save_file(*args, **kwargs)


def tensors(folder):
    """Every tensor of a folder, as the usual library reads it."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in sorted(file.keys()):
                assert key not in found
                found[key] = file.get_tensor(key)
    return found


def bits(tensor):
    """The bytes of a tensor, for exact comparison."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


def copy(folder, out, *, change=None, shards=1, config=None):
    """A copy with its tensors changed by `change(dict)`, in that many shards, config updated."""
    out = Path(out)
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    state = tensors(folder)
    if change is not None:
        change(state)
    keys = sorted(state)
    files = {
        f"model-{n + 1:05d}-of-{shards:05d}.safetensors": keys[n::shards] for n in range(shards)
    }
    if shards == 1:
        files = {"model.safetensors": keys}
    for name, names in files.items():
        save_file({key: state[key].contiguous() for key in names}, out / name, {"format": "pt"})
    if shards > 1:
        index = {key: name for name, names in files.items() for key in names}
        (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if config is not None:
        edit_config(out, config)
    return out


def edit_config(folder, change):
    """Lets `change(dict)` edit config.json in place."""
    document = json.loads((folder / "config.json").read_text())
    change(document)
    (folder / "config.json").write_text(json.dumps(document))
