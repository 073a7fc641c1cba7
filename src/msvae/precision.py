"""In which precision a device multiplies fastest."""

import torch


def low_pays(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32.

    A CPU without instructions for it emulates it, which is slower.
    """
    if device.type == "cpu":
        told = torch.cpu.get_capabilities()
        return bool(told.get("avx512_bf16") or told.get("amx_bf16"))
    return device.type == "cuda"
