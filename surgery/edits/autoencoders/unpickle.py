"""The child process of `dictionary_learning.unpickled`: `python -m … job.json`."""

from __future__ import annotations

import sys
from typing import Any

from surgery import process
from surgery.errors import CheckpointError, quote


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    """Saves the float tensors of a pickled state dict as safetensors."""
    import torch
    from safetensors.torch import save_file

    try:
        state = torch.load(arguments["path"], map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever is in the file, it is not what was asked for
        reason = quote(str(error).strip().partition("\n")[0], 200)
        raise CheckpointError(f"{arguments['path']}: not a pickle of tensors: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{arguments['path']}: expected a state dict of named tensors")
    floats = {
        name: tensor.detach().clone().contiguous()
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    }
    save_file(floats, arguments["output"])
    return {}


if __name__ == "__main__":
    sys.exit(process.serve(sys.argv[1], work))
