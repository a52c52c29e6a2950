"""讀出來的通訊怎麼存、怎麼寫進表格；以及 TPU 的一種寫法。"""

import re
from pathlib import Path

from collectives import Collective, read_collectives
from jax.sharding import Mesh

import lesson


def read_chip_collectives(program_text: str, mesh: Mesh) -> list[Collective]:
    """read_collectives，再認出 TPU 的 reduce-scatter：一個叫 all-reduce-scatter 的函式，裡面寫成 all-reduce 再切。"""
    scatters = "".join(re.findall(r"^%all-reduce-scatter.*?^}", program_text, re.MULTILINE | re.DOTALL))
    found = read_collectives(program_text, mesh)
    return [each._replace(operation="reduce-scatter") if each.line in scatters else each for each in found]


def save_collectives(found: dict[str, list[Collective]], out_dir: Path) -> None:
    """collectives_*.txt：編譯好的程式裡的每一次通訊，一行一次。"""
    for name, collectives in found.items():
        lines = "\n".join(collective.line for collective in collectives)
        lesson.save(out_dir / f"collectives_{name}.txt", f"{lines}\n".encode())


def table_cells(summary: list[dict]) -> tuple[str, str]:
    """表格裡的兩格：每一種幾次、沿著哪些軸，以及一共多少 KB。"""
    calls = "、".join(f"{c['operation']} × {c['count']} ({c['axes']})" for c in summary) or "沒有"
    return calls, f"{sum(c['bytes'] for c in summary) / 1e3:,.1f}"
