"""第 5 課命令列的寫法：--mesh 4x2 與 --rules batch=data,mlp=model。寫法不對就丟出 ValueError。"""

import math
import re

from llama import AXES

MESH_AXES = ("data", "model")


def parse_mesh(text: str) -> dict[str, int]:
    """'4x2' → {'data': 4, 'model': 2}。"""
    if not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", text):
        raise ValueError(f"Mesh 是 {text}；要寫成 data 軸 x model 軸，例如 4x2")
    return dict(zip(MESH_AXES, map(int, text.split("x")), strict=True))


def mesh_size(text: str) -> int:
    """'4x2' → 8 個裝置。"""
    return math.prod(parse_mesh(text).values())


def parse_rules(text: str) -> dict:
    """'batch=data,mlp=data+model' → {'batch': 'data', 'mlp': ('data', 'model')}；'embed=None' 表示不切。"""
    rules = {}
    for item in text.split(","):
        axis, equals, target = item.partition("=")
        if axis not in AXES or not equals:
            raise ValueError(f"--rules 的 {item!r}；要寫成 軸=data，軸是 {'、'.join(AXES)} 之一")
        if axis in rules:
            raise ValueError(f"--rules 的 {axis} 寫了兩次；一個軸只能有一條規則")
        parts = () if target == "None" else tuple(target.split("+"))
        if not set(parts) <= set(MESH_AXES) or len(set(parts)) < len(parts):
            right = f"Mesh 的軸只有 {'、'.join(MESH_AXES)}，合起來寫 data+model，不切寫 None"
            raise ValueError(f"--rules 的 {item!r}；{right}")
        rules[axis] = parts[0] if len(parts) == 1 else parts or None
    return rules
