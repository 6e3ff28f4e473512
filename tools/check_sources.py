"""Rules of the sources that no linter knows; run by `make lint`.

- Kernel files include no torch header: 100 s to compile against 1 s.
- In the object files of one instruction set, every symbol that the linker may merge with another file's lies in the
  namespace of that instruction set: else a wide body could be linked into the narrow path, and crash on an older CPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED_WEAK = re.compile(r"^(DW\.ref\.|__clang_call_terminate|typeinfo|vtable)")


def kernels_with_torch_headers() -> list[str]:
    kernels = [*ROOT.glob("csrc/*/*_cpu.cpp"), *ROOT.glob("csrc/*/*.cu")]
    return [f"{k}: includes a torch header" for k in kernels if re.search(r"#include <(torch|ATen|c10)/", k.read_text())]


def symbols_outside_their_instruction_set() -> list[str]:
    found = []
    for folder in ROOT.glob("build/*/CMakeFiles/kernels_*.dir"):
        isa = folder.name.removeprefix("kernels_").removesuffix(".dir")
        if "sanitize" in folder.parts[-3] or isa == "baseline":
            continue
        for obj in folder.rglob("*.o"):
            lines = subprocess.run(["nm", "-C", str(obj)], capture_output=True, text=True, check=True).stdout.splitlines()
            weak = [line.split(maxsplit=2)[2] for line in lines if re.match(r"^[0-9a-f]+ [VWu] ", line)]
            found += [
                f"{obj}: {name}" for name in weak if not ALLOWED_WEAK.match(name) and f"madkernels::{isa}::" not in name
            ]
    return found


def main() -> int:
    problems = kernels_with_torch_headers() + symbols_outside_their_instruction_set()
    print("\n".join(problems) or "sources: no torch header in a kernel, no symbol outside its instruction set")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
