"""What the processor can do; asked of the system, since no library says it on all of them."""

import os
import platform
from functools import lru_cache
from pathlib import Path

# oneDNN's names of instruction sets, each with the flag that Linux gives it; the best last.
LEVELS = {
    "SSE41": "sse4_1",
    "AVX": "avx",
    "AVX2": "avx2",
    "AVX512_CORE": "avx512vl",
    "AVX512_CORE_BF16": "avx512_bf16",
    "AVX512_CORE_AMX": "amx_bf16",
}
LIMIT = "ONEDNN_MAX_CPU_ISA"  # the environment variable by which a user holds oneDNN to a lower one


@lru_cache(maxsize=1)
def flags() -> frozenset[str]:
    """The processor's flags as Linux lists them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((x.split(":")[1].split() for x in lines if x.startswith("flags")), ()))


def instruction_set() -> str:
    """The best of `LEVELS` that the processor has and the environment allows, else its architecture."""
    names = list(LEVELS)
    limit = os.environ.get(LIMIT, "").upper()
    reached = [name for name in names if limit.startswith(name)]  # AVX512_CORE_VNNI: AVX512_CORE
    if reached:
        names = names[: names.index(reached[-1]) + 1]
    best = [name for name in names if LEVELS[name] in flags()]
    return best[-1] if best else platform.machine()


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; emulated it is slower than float32."""
    return instruction_set() in ("AVX512_CORE_BF16", "AVX512_CORE_AMX")


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
