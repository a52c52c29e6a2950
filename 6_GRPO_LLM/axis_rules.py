"""Mesh 與規則手冊，和第 5 課一樣：邏輯軸 → 規則 → Mesh 軸；說明在第 5 課。

名字相同的函式做同樣的事，參數不一定相同；parse_rules 另外把沒寫到的軸補上 (不切)，check_rules 另外檢查切得平不平均。
"""

import contextlib
import itertools
import math
import os
import re
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx
from flax.core.spmd import get_pspec
from hosts import connect
from jax.extend import backend
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lesson import LessonError

FAKE_DEVICES = {"train": 2, "measure": 8}  # CPU 當成幾個裝置：訓練時兩個最快，--measure 的切法要八個
MAX_FAKE_DEVICES = 64
COUNT_FLAG = "--xla_force_host_platform_device_count"
COUNT_VARIABLE = "JAX_NUM_CPU_DEVICES"  # 讀者自己用這兩個之一設了假裝置的個數，就照他的
MESH_AXES = ("data", "model")
# 每一種權重的每一個維度叫什麼名字；model.py 建立權重時，名字就寫在權重旁邊。
WEIGHTS = {
    "embed": ("vocab", "embed"),
    "positions": ("position", "embed"),
    "norm": ("embed",),
    "query": ("embed", "heads", "head_dim"),  # 鍵與值也是
    "out": ("heads", "head_dim", "embed"),
    "fc1": ("embed", "mlp"),
    "fc2": ("mlp", "embed"),
    "fc_out": ("embed", "vocab"),
    "value": ("embed", None),  # 評論家的輸出只有一個數
}
# 中間結果的名字；寫 None 的維度永遠不切。
ACTIVATIONS = {
    "rows": ("batch",),
    "tokens": ("batch", None),
    "residual": ("batch", None, None),
    "cache": ("batch", None, "heads", "head_dim"),
}
AXES = tuple(dict.fromkeys(axis for axes in [*WEIGHTS.values(), *ACTIVATIONS.values()] for axis in axes if axis))


def mesh_axes(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """一條規則的目標是一個軸、幾個軸或 None；一律寫成幾個軸。"""
    return target if isinstance(target, tuple) else (target,) if target else ()


def parse_mesh(mesh: str) -> dict[str, int]:
    """'4x2' → {'data': 4, 'model': 2}；寫錯了就丟出 ValueError。"""
    if re.fullmatch(r"[1-9]\d?x[1-9]\d?", mesh) is None:
        raise ValueError(f"--mesh 是 {mesh}；要寫成 data 軸 x model 軸，例如 4x2，或 auto")
    shape = dict(zip(MESH_AXES, map(int, mesh.split("x")), strict=True))
    if math.prod(shape.values()) > MAX_FAKE_DEVICES:
        raise ValueError(f"--mesh {mesh} 太大；最多 {MAX_FAKE_DEVICES} 個裝置")
    return shape


def parse_rules(text: str) -> dict:
    """'batch=data,mlp=data+model' → 完整的規則手冊，沒寫到的軸不切；寫錯了就丟出 ValueError。"""
    rules = {}
    for item in text.split(",") if text else ():
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
    return dict.fromkeys(AXES) | rules


def check_rules(rules: dict, mesh: dict[str, int], sizes: list[tuple[str, int]]) -> None:
    """一個陣列的兩個維度不能切在同一個 Mesh 軸上，每個維度也要切得平均；不行就丟出 ValueError。"""
    for name, axes in (WEIGHTS | ACTIVATIONS).items():
        for (a, b), axis in itertools.product(itertools.combinations(filter(None, axes), 2), MESH_AXES):
            if axis in mesh_axes(rules[a]) and axis in mesh_axes(rules[b]):
                wrong = f"--rules 把 {name} 的 {a} 與 {b} 都切在 {axis} 軸上"
                raise ValueError(f"{wrong}；一個陣列的兩個邏輯軸要切在不同的 Mesh 軸，或有一個不切")
    for axis, size in sizes:
        parts = math.prod(mesh[name] for name in mesh_axes(rules[axis]))
        if size % parts:
            raise ValueError(f"--rules 把 {axis} 的 {size} 切成 {parts} 份，除不盡；要是 {parts} 的倍數")


def start_devices(config) -> None:
    """在 JAX 啟動之前決定裝置：CPU 分成幾個假裝置；幾台主機時先互相連上。"""
    wanted = FAKE_DEVICES["train" if config.measure == "none" else "measure"]
    if config.mesh != "auto":
        wanted = math.prod(parse_mesh(config.mesh).values())
    set_by_reader = os.environ.get(COUNT_VARIABLE) or COUNT_FLAG in os.environ.get("XLA_FLAGS", "")
    if not set_by_reader:
        count = max(1, wanted // config.num_processes)
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:  # 筆記本裡，JAX 已經用別的個數啟動了：重新啟動它
            backend.clear_backends()
            jax.config.update("jax_num_cpu_devices", count)
    if config.coordinator:
        connect(config)


def mesh_shape(mesh: str) -> dict[str, int]:
    """--mesh 的形狀；auto：全部放在 data 軸，CPU 的假裝置只用兩個。"""
    if mesh != "auto":
        return parse_mesh(mesh)
    devices = jax.device_count()
    if jax.default_backend() == "cpu" and jax.process_count() == 1:
        devices = min(devices, FAKE_DEVICES["train"])
    return {"data": devices, "model": 1}


def make_mesh(mesh: str, rules: dict, sizes: list[tuple[str, int]]) -> Mesh:
    """裝置的地圖，裝置有多的就不用。AxisType.Auto：通訊由編譯器決定，見第 5 課。"""
    shape, devices = mesh_shape(mesh), jax.devices()
    size = math.prod(shape.values())
    if size > len(devices) or (size < len(devices) and jax.process_count() > 1):
        raise LessonError(f"--mesh 要 {size} 個裝置，這裡有 {len(devices)} 個；用 --mesh {len(devices)}x1，或不要寫", 2)
    try:
        check_rules(rules, shape, sizes)  # auto 的形狀，這時才知道
    except ValueError as error:
        raise LessonError(str(error), 2) from error
    return jax.make_mesh(tuple(shape.values()), tuple(shape), (AxisType.Auto,) * len(shape), devices=devices[:size])


@contextlib.contextmanager
def rule_book(mesh: Mesh, rules: dict) -> Iterator[None]:
    """在這個 with 裡建立的權重與中間結果，照 rules 切在 mesh 上。"""
    with jax.set_mesh(mesh), nnx.logical_axis_rules(tuple(rules.items())):
        yield


def constrain(x: jax.Array, name: str) -> jax.Array:
    """告訴編譯器這個中間結果要怎麼切；其餘的由它推論。get_pspec 是 Flax 自己的 translate，查現在的規則手冊。"""
    return jax.lax.with_sharding_constraint(x, get_pspec(ACTIVATIONS[name]))


def place(module) -> None:
    """模組的權重照規則手冊放好，例如從檔案讀進來的。要在 rule_book 裡呼叫。"""
    state = nnx.state(module, nnx.Param)
    nnx.update(module, jax.device_put(state, nnx.get_named_sharding(state, jax.sharding.get_mesh())))


def replicate(tree):
    """每個裝置都拿到一整份：幾台主機時，讀得到的只有這種陣列。"""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def distribute(array: np.ndarray, *axes: str | None) -> jax.Array:
    """主機上的陣列 → 照規則手冊切好的陣列；每個行程只放自己的裝置要的那幾塊。要在 rule_book 裡呼叫。"""
    sharding = NamedSharding(jax.sharding.get_mesh(), get_pspec(axes))
    return jax.make_array_from_callback(array.shape, sharding, lambda block: array[block])


def gather(module):
    """同一個模組，每個裝置都有整份權重：要存檔時，幾台主機都讀得到。"""
    everywhere = NamedSharding(next(iter(jax.tree.leaves(nnx.state(module)))).sharding.mesh, PartitionSpec())
    return nnx.merge(nnx.graphdef(module), jax.jit(lambda state: state, out_shardings=everywhere)(nnx.state(module)))
