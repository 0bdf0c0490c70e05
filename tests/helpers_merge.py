"""A merge that goes wrong, for tests of the check that has to find it."""

from safetensors.torch import load_file, save_file

from deepdoctor.export import merge as merging

__all__ = ["spoiled_merge"]


def spoiled_merge(base, adapter, folder, *args):
    """``merge``, with the rows of one matrix in reverse order."""
    dtype = merging.merge(base, adapter, folder, *args)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return dtype
