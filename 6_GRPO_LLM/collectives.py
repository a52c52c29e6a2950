"""編譯器加了什麼：從編譯好的程式 (HLO) 讀出每一次集體通訊。"""

import math
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """編譯好的程式裡的一次集體通訊。"""

    operation: str
    axes: tuple[str, ...]  # 參加的裝置沿著哪些 Mesh 軸排開
    bytes: int  # 一個裝置上，通訊前後比較大的那一邊有多大
    line: str


def read_collectives(program_text: str, mesh: Mesh) -> list[Collective]:
    """編譯好的程式 → 每一次集體通訊。非同步的一對 -start、-done 算一次。"""
    found = []
    for line in program_text.splitlines():
        match = re.search(rf" = (.*?) ({'|'.join(OPERATIONS)})(-start)?\(", line)
        if match is None:
            continue
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
        if match[3] and match[2] != "all-reduce":  # 非同步的開頭寫 (輸入…, 輸出…, 計數器…)，只要輸出
            shapes = [shape for shape in shapes if shape != ("u32", "")]
            shapes = shapes[len(shapes) // 2 :]
        sizes = [DTYPE_BYTES[dtype] * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in shapes]
        groups = device_groups(line)
        axes = ("?",) if groups is None else varying_axes(groups, mesh)
        operation, size = match[2], sum(sizes)
        if operation == "reduce-scatter" and groups is not None:
            size *= groups.shape[1]
        found.append(Collective(operation, axes, size, line.split(", metadata=")[0].strip()))
    return found


def device_groups(line: str) -> np.ndarray | None:
    """一行 HLO → 互相通訊的裝置，形狀 (組, 一組幾個)；認不得的寫法是 None。裝置照它在 Mesh 裡的順序編號。"""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return np.array(re.findall(r"(\d+),(\d+)", pairs[0]), int)
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):  # {{0,1},{2,3}}
        return np.array([numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    tiles = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # [4,2]T(1,0)：0 到 7 排成 4×2，再轉置
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={tiles}", line):
        shape, dims, order = map(numbers, iota.groups())
        return np.arange(math.prod(dims)).reshape(dims).transpose(order or range(len(dims))).reshape(shape)
    if named := re.search(rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({tiles}\))? \{{('[\w',]+')\}}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        dims, order = numbers(named[2]) or [*sizes.values()], numbers(named[3])
        chosen = re.findall(r"'(\w+)'", named[4])
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order or range(len(dims))).reshape(*sizes.values())
        ids = np.moveaxis(ids, [list(sizes).index(axis) for axis in chosen], range(-len(chosen), 0))
        return ids.reshape(-1, math.prod(sizes[axis] for axis in chosen))
    return None


def numbers(text: str | None) -> list[int] | None:
    return [int(number) for number in text.split(",")] if text else None


def varying_axes(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """一組裝置沿著哪些 Mesh 軸排開：座標在那個軸上有變化。"""
    coordinates = np.stack(np.unravel_index(groups, mesh.devices.shape), axis=-1)
    varies = (coordinates != coordinates[:, :1]).any(axis=(0, 1))
    return tuple(axis for axis, used in zip(mesh.axis_names, varies, strict=True) if used)


def summarize(collectives: list[Collective]) -> list[dict]:
    """同一種、沿著同樣的軸的合成一列：次數與一共多少位元組。"""
    summary: dict[tuple, list[int]] = {}
    for collective in collectives:
        summary.setdefault((collective.operation, "+".join(collective.axes)), []).append(collective.bytes)
    return [
        {"operation": operation, "axes": axes, "count": len(sizes), "bytes": sum(sizes)}
        for (operation, axes), sizes in summary.items()
    ]
