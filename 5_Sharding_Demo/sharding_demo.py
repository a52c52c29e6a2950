"""第 5 課：Mesh 與切分規則，從一顆晶片到許多晶片 (模組六)。

問題：80 億個參數的模型為什麼放不進一顆晶片？Mesh 與 logical_axis_rules 怎麼解決？切開之後，算出來的還一樣嗎？

    python 5_Sharding_Demo/sharding_demo.py                        五種策略各訓練 20 步，比位元組、通訊與損失
    python 5_Sharding_Demo/sharding_demo.py --mesh 2x4             換一張地圖
    python 5_Sharding_Demo/sharding_demo.py --rules batch=data,mlp=model    自己寫一本規則手冊
    python 5_Sharding_Demo/sharding_demo.py --ledger llama3-8b     真正的 Llama 3 8B：每顆晶片要多少記憶體

沒有 GPU 或 TPU 時，腳本請 XLA 把 CPU 當成八個假裝置；有的話就用真的，個數不是八個就要改 --mesh。
結果在 outputs/：learning_curve.png、bytes_and_collectives.png、placement_*.png、collectives_*.txt、metrics.json。

出處：張量平行：Shoeybi 等 (2019)，arXiv 1909.08053，第 3 節。切分最佳化器狀態與權重 (ZeRO、FSDP)：
Rajbhandari 等 (2020)，arXiv 1910.02054，第 5 節。由標註切分整個程式 (GSPMD)：Xu 等 (2021)，arXiv 2105.04663。
"""

import time

PROCESS_START = time.perf_counter()  # 在匯入之前記下：回報的總時間從這裡算起

import contextlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FAKE_DEVICES = 8
MAX_FAKE_DEVICES = 512
TARGET_DIFFERENCE = 1e-4
BYTES = 256  # 詞彙表：一個位元組一個詞元
MESH_AXES = ("data", "model")

# 1. 超參數 -------------------------------------------------------------------------------------------

# 規則手冊：邏輯軸 → Mesh 軸，沒寫到的邏輯軸不切。('data', 'model') 表示兩個軸合起來切。
EVERYTHING = ("data", "model")
TENSOR_PARALLEL = {"mlp": "model", "heads": "model", "kv_heads": "model", "vocab": "model"}
RULES = {
    "single": {},
    "data": {"batch": EVERYTHING},
    "model": dict.fromkeys(TENSOR_PARALLEL, EVERYTHING),
    "data_model": {"batch": "data", **TENSOR_PARALLEL},
    "fsdp": {"batch": "data", "embed": "data", **TENSOR_PARALLEL},
}


@dataclass(frozen=True)
class Llama:
    """一個 Llama 的形狀；欄位的名字就是邏輯軸的名字。"""

    vocab: int
    embed: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    dtype: str = "float32"
    remat: bool = False  # 反向傳播時重算每一層，而不是存下來；同時把各層收進一個迴圈，編譯得快


LLAMAS = {
    "llama3-8b": Llama(128256, 4096, 14336, 32, 8, 128, 32, "bfloat16", remat=True),
    "llama3-70b": Llama(128256, 8192, 28672, 64, 8, 128, 80, "bfloat16", remat=True),
}
PUBLISHED_PARAMETERS = {"llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496}
LEDGER_TOKENS = 2048  # 記憶體帳：一個序列的長度；批次等於晶片數
CHIPS = {"TPU v5e": 16, "TPU v6e": 32, "H100": 80, "TPU v5p": 95}  # HBM，GB


@dataclass(frozen=True)
class Config:
    """超參數的唯一來源：命令列、README 的表格與測試都讀這裡。"""

    strategies: tuple[Literal[*RULES], ...] = tuple(RULES)
    """要跑的策略；single 是對照，一定會先跑"""
    rules: str = ""
    """自己的規則手冊，例如 batch=data,mlp=model；兩個軸合起來寫 data+model。多跑一種叫 custom 的策略"""
    mesh: str = "4x2"
    """Mesh 的形狀：data 軸 x model 軸"""
    ledger: Literal["none", *LLAMAS] = "none"
    """不訓練，改算這個模型的記憶體帳"""
    ledger_meshes: tuple[str, ...] = ("1x8", "4x2", "8x8")
    """記憶體帳要算哪些 Mesh；1x1 的 single 一定會算"""
    coordinator: str = ""
    """多台主機：第 0 個行程的 HOST:PORT；auto 表示由 TPU 或 Slurm 的環境決定"""
    num_processes: int = 1
    """多台主機：總共幾個行程"""
    process_id: int = 0
    """多台主機：這是第幾個行程，從 0 開始"""
    seed: int = 42
    """隨機種子 (seed)"""
    steps: int = 20
    """每種策略訓練幾步"""
    batch_size: int = 16
    """一步用幾段文字"""
    sequence_length: int = 128
    """一段文字的長度，單位是位元組"""
    num_layers: int = 2
    """Transformer 的層數"""
    embed_dim: int = 128
    """殘差流的寬度 (embed 軸)"""
    mlp_dim: int = 384
    """MLP 中間的寬度 (mlp 軸)"""
    num_heads: int = 16
    """注意力頭的個數 (heads 軸)"""
    num_kv_heads: int = 8
    """鍵與值的頭數 (kv_heads 軸)；比 num-heads 少就是 GQA"""
    learning_rate: float = 1e-3
    """Adam 的學習率"""
    out_dir: Path = Path(__file__).resolve().parent / "outputs"
    """結果放在哪裡"""

    @property
    def llama(self) -> Llama:
        head_dim = self.embed_dim // self.num_heads
        return Llama(BYTES, self.embed_dim, self.mlp_dim, self.num_heads, self.num_kv_heads, head_dim, self.num_layers)

    @property
    def rule_books(self) -> dict[str, dict]:
        """要跑的策略 → 完整的規則手冊；single 排第一。"""
        books = {name: RULES[name] for name in ("single", *self.strategies)}
        if self.rules:
            books["custom"] = parse_rules(self.rules)
        return {name: dict.fromkeys(AXES) | book for name, book in books.items()}


BOUNDS = {  # 每個數值旗標的下限與上限
    "num_processes": (1, 10_000),
    "process_id": (0, 9_999),
    "seed": (0, 2**32 - 1),
    "steps": (1, math.inf),
    "batch_size": (1, math.inf),
    "sequence_length": (1, 1024),
    "num_layers": (1, 1000),
    "embed_dim": (2, math.inf),
    "mlp_dim": (1, math.inf),
    "num_heads": (1, math.inf),
    "num_kv_heads": (1, math.inf),
    "learning_rate": (0, 1e30),
}


def check(config: Config) -> None:
    """不合理的值在做任何事之前就拒絕 (結束狀態 2)；裝置與 Mesh 由 check_mesh 檢查。"""
    require_bounds(config, BOUNDS)
    require(
        config.process_id < config.num_processes,
        f"--process-id 是 {config.process_id}",
        f"行程從 0 數到 {config.num_processes - 1} (--num-processes {config.num_processes})",
    )
    require(
        bool(config.coordinator) or config.num_processes == 1,
        f"--num-processes 是 {config.num_processes}，卻沒有 --coordinator",
        "要是第 0 個行程的 HOST:PORT",
    )
    require(
        config.coordinator in ("", "auto") or re.fullmatch(r".+:\d+", config.coordinator),
        f"--coordinator 是 {config.coordinator}",
        "要是 HOST:PORT，例如 127.0.0.1:9876，或 auto",
    )
    require(
        config.coordinator != "auto" or config.num_processes == 1,
        f"--coordinator auto 與 --num-processes {config.num_processes} 一起用",
        "auto 自己知道有幾個行程，不要寫 --num-processes",
    )
    require(
        config.ledger == "none" or not config.coordinator,
        f"--ledger {config.ledger} 與 --coordinator 一起用",
        "記憶體帳在一個行程裡編譯，不要寫 --coordinator",
    )
    require(
        config.embed_dim % (2 * config.num_heads) == 0,
        f"--embed-dim 是 {config.embed_dim}",
        f"每個頭分到的寬度要是偶數 (旋轉位置編碼成對旋轉)，所以要是 {2 * config.num_heads} 的倍數",
    )
    require(
        config.num_heads % config.num_kv_heads == 0,
        f"--num-kv-heads 是 {config.num_kv_heads}",
        f"每個鍵值頭服務一樣多的注意力頭，要整除 --num-heads {config.num_heads}",
    )
    for mesh in (config.mesh, *config.ledger_meshes):
        right = "要寫成 data 軸 x model 軸，例如 4x2"
        require(re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", mesh) is not None, f"Mesh 是 {mesh}", right)
    for mesh in config.ledger_meshes:
        size = math.prod(parse_mesh(mesh).values())
        require(size <= MAX_FAKE_DEVICES, f"--ledger-meshes 的 {mesh} 有 {size} 個裝置", f"最多 {MAX_FAKE_DEVICES} 個")
    require(
        config.ledger == "none" or bool(config.ledger_meshes), "--ledger-meshes 是空的", "至少要一張 Mesh，例如 4x2"
    )
    for strategy, rules in config.rule_books.items():
        check_rules(strategy, rules)


def check_mesh(config: Config) -> None:
    """裝置的個數要等於 Mesh 的大小，每個維度都要切得開；要在 start_devices 之後。"""
    devices, mesh = jax.device_count(), parse_mesh(config.mesh)
    fits = "、".join(f"{n}x{devices // n}" for n in range(1, devices + 1) if devices % n == 0)
    hint = "" if jax.default_backend() == "cpu" else "；想用八個假裝置，設 JAX_PLATFORMS=cpu"
    size = math.prod(mesh.values())
    require(size == devices, f"--mesh {config.mesh} 要 {size} 個裝置，這裡有 {devices} 個", f"{fits} 才合{hint}")
    sizes = axis_sizes(config.llama, config.batch_size, config.sequence_length)
    for strategy, rules in config.rule_books.items():
        problem = None if strategy == "single" else indivisible(rules, sizes, mesh)
        if problem:
            axis, parts = problem
            where = " × ".join(f"{name} 軸 {mesh[name]}" for name in mesh_axes(rules[axis]))
            wrong = f"{strategy} 把 {axis} 的 {sizes[axis]} 切成 {parts} 份 ({where})，除不盡"
            fail(f"{wrong}；要是 {parts} 的倍數", status=2)


# 2. 規則手冊：邏輯軸 → Mesh 軸 -----------------------------------------------------------------------

# 每一個權重的每一個維度叫什麼名字。所有層的權重疊成一個陣列，第一個維度是層。
WEIGHTS = {
    "embedding": ("vocab", "embed"),
    "attention_norm": ("layers", "embed"),
    "query": ("layers", "embed", "heads", "head_dim"),
    "key": ("layers", "embed", "kv_heads", "head_dim"),
    "value": ("layers", "embed", "kv_heads", "head_dim"),
    "out": ("layers", "heads", "head_dim", "embed"),
    "mlp_norm": ("layers", "embed"),
    "gate": ("layers", "embed", "mlp"),
    "up": ("layers", "embed", "mlp"),
    "down": ("layers", "mlp", "embed"),
    "final_norm": ("embed",),
    "lm_head": ("embed", "vocab"),
}
# 中間結果的名字；寫 None 的維度永遠不切。殘差流的寬度就是這樣：embed 這條規則只管權重。
ACTIVATIONS = {
    "tokens": ("batch", "sequence"),
    "residual": ("batch", "sequence", None),
    "heads": ("batch", None, "heads", None),
    "kv_heads": ("batch", None, "kv_heads", None),
    "hidden": ("batch", None, "mlp"),
    "logits": ("batch", None, "vocab"),
}
AXES = tuple(dict.fromkeys(axis for axes in [*WEIGHTS.values(), *ACTIVATIONS.values()] for axis in axes if axis))


def translate(axes: tuple[str | None, ...], rules: dict) -> PartitionSpec:
    """邏輯軸 → 規則手冊 → 每個維度切在哪個 Mesh 軸上；None 表示不切。"""
    return PartitionSpec(*(rules[axis] if axis else None for axis in axes))


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """PartitionSpec 的一個項目是一個軸、幾個軸或 None；一律寫成幾個軸。"""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def axis_sizes(llama: Llama, batch_size: int, sequence_length: int) -> dict[str, int]:
    sizes = asdict(llama) | {"batch": batch_size, "sequence": sequence_length}
    return {axis: sizes[axis] for axis in AXES}


def parse_mesh(mesh: str) -> dict[str, int]:
    return dict(zip(MESH_AXES, map(int, mesh.split("x")), strict=True))


def parse_rules(text: str) -> dict:
    """'batch=data,mlp=data+model' → {'batch': 'data', 'mlp': ('data', 'model')}；'embed=None' 表示不切。"""
    rules = {}
    for item in text.split(","):
        axis, equals, target = item.partition("=")
        require(axis in AXES and bool(equals), f"--rules 的 {item!r}", f"要寫成 軸=data，軸是 {'、'.join(AXES)} 之一")
        parts = () if target == "None" else tuple(target.split("+"))
        known = set(parts) <= set(MESH_AXES) and len(set(parts)) == len(parts)
        require(
            known, f"--rules 的 {item!r}", f"Mesh 的軸只有 {'、'.join(MESH_AXES)}，合起來寫 data+model，不切寫 None"
        )
        rules[axis] = parts[0] if len(parts) == 1 else parts or None
    return rules


def check_rules(strategy: str, rules: dict) -> None:
    """一個陣列的兩個維度不能切在同一個 Mesh 軸上：同一排裝置不能同時排兩個方向。"""
    for name, axes in (WEIGHTS | ACTIVATIONS).items():
        for (a, b), axis in itertools.product(itertools.combinations(filter(None, axes), 2), MESH_AXES):
            require(
                not (axis in mesh_axes(rules[a]) and axis in mesh_axes(rules[b])),
                f"{strategy} 把 {name} 的 {a} 與 {b} 都切在 {axis} 軸上",
                "一個陣列的兩個邏輯軸要切在不同的 Mesh 軸，或有一個不切",
            )


def indivisible(rules: dict, sizes: dict, mesh: dict) -> tuple[str, int] | None:
    """第一個除不盡的邏輯軸，以及它要切成幾份；都除得盡就是 None。"""
    for axis in AXES:
        parts = math.prod(mesh[name] for name in mesh_axes(rules[axis]))
        if sizes[axis] % parts:
            return axis, parts
    return None


# 3. 裝置與 Mesh --------------------------------------------------------------------------------------


def start_devices(config: Config) -> None:
    """在 JAX 啟動之前決定裝置：CPU 分成幾個假裝置；幾台主機時先互相連上。"""
    flag = "--xla_force_host_platform_device_count"
    if config.ledger != "none":
        jax.config.update("jax_platforms", "cpu")  # 只編譯、不執行，用假裝置就夠了
        wanted = max(math.prod(parse_mesh(mesh).values()) for mesh in config.ledger_meshes)
    else:
        wanted = max(1, FAKE_DEVICES // config.num_processes)
    if flag not in os.environ.get("XLA_FLAGS", ""):  # 讀者自己設了就照他的
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={wanted}".strip()
    if config.coordinator == "auto":
        try:
            jax.distributed.initialize()
        except ValueError:
            fail("--coordinator auto 在這裡找不到 TPU 或 Slurm；要寫第 0 個行程的 HOST:PORT", status=2)
    elif config.coordinator:
        jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    if config.ledger != "none":
        devices = jax.device_count()
        require(
            devices >= wanted, f"--ledger-meshes 要 {wanted} 個裝置，這裡有 {devices} 個", f"XLA_FLAGS 不要設 {flag}"
        )
    else:
        check_mesh(config)


def make_mesh(shape: dict[str, int], devices: list | None = None) -> Mesh:
    """裝置的地圖。AxisType.Auto：通訊由編譯器決定；JAX 0.10 的預設是 Explicit，切法寫進每個陣列的型別。"""
    return jax.make_mesh(tuple(shape.values()), tuple(shape), (AxisType.Auto,) * len(shape), devices=devices)


def strategy_mesh(config: Config, strategy: str) -> Mesh:
    """single 只用一個裝置 (每台主機各算各的)；其餘的用整張地圖。"""
    if strategy == "single":
        return make_mesh({"data": 1, "model": 1}, jax.local_devices()[:1])
    return make_mesh(parse_mesh(config.mesh))


@contextlib.contextmanager
def rule_book(mesh: Mesh, rules: dict) -> Iterator[None]:
    """在這個 with 裡建立的權重，照 rules 切在 mesh 上。"""
    with jax.set_mesh(mesh), nnx.logical_axis_rules(tuple(rules.items())):
        yield


# 4. 模型：Llama 的樣子 -------------------------------------------------------------------------------


def constrain(x: jax.Array, name: str) -> jax.Array:
    """告訴編譯器這個中間結果要怎麼切；其餘的由它推論。"""
    return jax.lax.with_sharding_constraint(x, translate(ACTIVATIONS[name], dict(get_logical_axis_rules())))


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def rotary(x: jax.Array) -> jax.Array:
    """旋轉位置編碼 (RoPE)：(batch, sequence, heads, head_dim)，前半與後半成對旋轉，角度與位置成正比。"""
    half = x.shape[-1] // 2
    angles = jnp.outer(jnp.arange(x.shape[1]), 500_000.0 ** (-jnp.arange(half) / half))[:, None, :]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Block(nnx.Module):
    """一層 Transformer。建立時權重有 layers 維度 (所有層疊在一起)，呼叫時已經切成一層。"""

    def __init__(self, make):
        self.attention_norm, self.mlp_norm = make("attention_norm"), make("mlp_norm")
        self.query, self.key, self.value, self.out = make("query"), make("key"), make("value"), make("out")
        self.gate, self.up, self.down = make("gate"), make("up"), make("down")

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + constrain(self.attention(rms_norm(x, self.attention_norm[...])), "residual")
        return x + constrain(self.mlp(rms_norm(x, self.mlp_norm[...])), "residual")

    def attention(self, x: jax.Array) -> jax.Array:
        """因果注意力：只看得到自己與前面的位置；一個鍵值頭由一組注意力頭共用 (GQA)。"""
        query = rotary(constrain(jnp.einsum("bse,ehd->bshd", x, self.query[...]), "heads"))
        key = rotary(constrain(jnp.einsum("bse,ehd->bshd", x, self.key[...]), "kv_heads"))
        value = constrain(jnp.einsum("bse,ehd->bshd", x, self.value[...]), "kv_heads")
        heads = constrain(jax.nn.dot_product_attention(query, key, value, is_causal=True), "heads")
        return jnp.einsum("bshd,hde->bse", heads, self.out[...])

    def mlp(self, x: jax.Array) -> jax.Array:
        """有閘門的 MLP (SwiGLU)：第一個矩陣切行、第二個矩陣切列，中間不必通訊。"""
        hidden = constrain(jax.nn.silu(x @ self.gate[...]) * (x @ self.up[...]), "hidden")
        return hidden @ self.down[...]


class Transformer(nnx.Module):
    """只有解碼器的語言模型：詞元 (batch, sequence) → logits (batch, sequence, vocab)。"""

    def __init__(self, llama: Llama, rngs: nnx.Rngs):
        sizes = asdict(llama)

        def make(name: str) -> nnx.Param:
            axes = WEIGHTS[name]
            shape = tuple(sizes[axis] for axis in axes)
            if name.endswith("norm"):
                return nnx.Param(jnp.ones(shape, llama.dtype), out_sharding=axes)
            fan_in = llama.mlp if name == "down" else llama.embed
            bound = math.sqrt(3 / fan_in)  # 變異數 1 / fan_in 的均勻分佈；編譯起來比常態快
            values = jax.random.uniform(rngs.params(), shape, llama.dtype, -bound, bound)
            return nnx.Param(values, out_sharding=axes)

        self.embedding, self.final_norm, self.lm_head = make("embedding"), make("final_norm"), make("lm_head")
        self.blocks = Block(make)
        self.remat = llama.remat

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = constrain(self.embedding[...][tokens], "residual")
        graphdef, layers = nnx.split(self.blocks)

        def block(x, layer):
            return nnx.merge(graphdef, layer)(x), None

        # 攤開迴圈 (unroll)：編譯出來的程式裡，每一次通訊都看得見、數得到
        x, _ = jax.lax.scan(jax.checkpoint(block) if self.remat else block, x, layers, unroll=not self.remat)
        return constrain(rms_norm(x, self.final_norm[...]) @ self.lm_head[...], "logits")


# 5. 訓練的一步，與切好的狀態 -------------------------------------------------------------------------


def cross_entropy(model: Transformer, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """平均一個詞元的損失，單位是 nat。"""
    logits = model(inputs).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def create(llama: Llama, learning_rate: float, seed: int | jax.Array) -> tuple[Transformer, nnx.Optimizer]:
    # rbg 編譯得快；怎麼切，抽到的數字都一樣。在 TPU 上它可能讓每個裝置都抽完整個權重：大模型用預設的 threefry
    key = jax.random.key(seed, impl="rbg")
    model = Transformer(llama, nnx.Rngs(key))
    return model, nnx.Optimizer(model, optax.adam(learning_rate), wrt=nnx.Param)


class Program(NamedTuple):
    """一種策略編譯之前的樣子；全是抽象的形狀與切法，不佔記憶體。"""

    graphdef: nnx.GraphDef
    state: nnx.State  # 權重與 Adam 的動量，每個陣列是帶著切法的 jax.ShapeDtypeStruct
    tokens: jax.ShapeDtypeStruct


def plan(llama: Llama, learning_rate: float, mesh: Mesh, rules: dict, batch_size: int, sequence_length: int) -> Program:
    """每個陣列多大、切在哪裡。要在 rule_book 裡呼叫。"""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: create(llama, learning_rate, 0)))
    shardings = nnx.get_named_sharding(state, mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    tokens = NamedSharding(mesh, translate(ACTIVATIONS["tokens"], rules))
    return Program(graphdef, state, jax.ShapeDtypeStruct((batch_size, sequence_length), jnp.int32, sharding=tokens))


def compile_step(program: Program, execute: bool = True):
    """一個訓練步驟：正向、反向、Adam。順便把梯度交出來，好量它有多大。"""
    shardings = jax.tree.map(lambda x: x.sharding, program.state)

    def train_step(state, inputs, targets):
        model, optimizer = nnx.merge(program.graphdef, state)
        loss, gradients = nnx.value_and_grad(cross_entropy)(model, inputs, targets)
        gradients = jax.lax.with_sharding_constraint(gradients, nnx.get_partition_spec(gradients))  # 切法同權重
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), loss, gradients

    step = jax.jit(train_step, out_shardings=(shardings, None, None), donate_argnums=0)
    lowered = step.lower(program.state, program.tokens, program.tokens)
    return lowered.compile({} if execute else {"xla_backend_optimization_level": 0})  # 不執行就不必把機器碼最佳化


# 6. 編譯器加了什麼：從編譯好的程式讀出集體通訊 -------------------------------------------------------

DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """編譯好的程式裡的一次集體通訊。"""

    operation: str
    axes: tuple[str, ...]  # 參加的裝置沿著哪些 Mesh 軸排開
    bytes: int  # 一個裝置上，通訊前後比較大的那一邊有多大
    line: str


def device_groups(line: str) -> np.ndarray | None:
    """一行 HLO → 互相通訊的裝置，形狀 (組, 一組幾個)；認不得的寫法是 None。裝置照它在 Mesh 裡的順序編號。"""

    def numbers(text: str | None) -> list[int] | None:
        return [int(number) for number in text.split(",")] if text else None

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


def varying_axes(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """一組裝置沿著哪些 Mesh 軸排開：座標在那個軸上有變化。"""
    coordinates = np.stack(np.unravel_index(groups, mesh.devices.shape), axis=-1)
    varies = (coordinates != coordinates[:, :1]).any(axis=(0, 1))
    return tuple(axis for axis, used in zip(mesh.axis_names, varies, strict=True) if used)


def read_collectives(program_text: str, mesh: Mesh) -> list[Collective]:
    """編譯好的程式 (HLO) → 每一次集體通訊。非同步的一對 -start、-done 算一次。"""
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


# 7. 訓練與評估 ---------------------------------------------------------------------------------------


def read_text() -> np.ndarray:
    """這套課程自己的 README，一個位元組一個詞元；單獨複製這個資料夾時，只讀這一課的。"""
    folder = Path(__file__).resolve().parent
    paths = [folder / "README.md", folder.parent / "README.md", *sorted(folder.parent.glob("[0-9]_*/README.md"))]
    text = b"".join(path.read_bytes() for path in dict.fromkeys(paths) if path.is_file())
    require(len(text) > 20_000, f"README.md 只有 {len(text)} 個位元組", "訓練的文字是課程的 README，要和腳本放在一起")
    return np.frombuffer(text, np.uint8).astype(np.int32)


def sample_batch(text: np.ndarray, rng: np.random.Generator, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """隨機的 batch_size 段文字：輸入，與往後一個位元組的目標；形狀都是 (batch_size, sequence_length)。"""
    starts = rng.integers(0, len(text) - config.sequence_length, config.batch_size)
    windows = text[starts[:, None] + np.arange(config.sequence_length + 1)]
    return windows[:, :-1], windows[:, 1:]


def distribute(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """每個行程只把自己的裝置要的那幾塊放上去；一台或幾台主機都是這一行。"""
    return jax.make_array_from_callback(array.shape, sharding, lambda block: array[block])


def device_bytes(tree) -> int:
    """第一個裝置上實際放了多少位元組：量陣列的切片，不是算出來的。"""
    device = jax.local_devices()[0]
    shards = [shard for array in jax.tree.leaves(tree) for shard in array.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


@dataclass
class Result:
    """一種策略的結果。"""

    strategy: str
    mesh: Mesh
    rules: dict
    collectives: list[Collective]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # 每一步
    bytes: dict[str, int] = field(default_factory=dict)  # 一個裝置上的參數、梯度、動量
    weights: dict[str, jax.Array] = field(default_factory=dict)  # 權重的名字 → 切好的陣列
    test_loss: float = math.nan

    def difference(self, reference: "Result") -> np.ndarray:
        """每一步的損失與 reference 的相對差。"""
        steps = min(len(self.losses), len(reference.losses))
        ours, theirs = np.array(self.losses[:steps]), np.array(reference.losses[:steps])
        return np.abs(ours - theirs) / np.abs(theirs)


def initial_state(program: Program, config: Config) -> nnx.State:
    """每個裝置只建立自己的那一塊；任何一個裝置都不必放下整個模型。"""
    shardings = jax.tree.map(lambda x: x.sharding, program.state)
    build = jax.jit(lambda seed: nnx.state(create(config.llama, config.learning_rate, seed)), out_shardings=shardings)
    return build(np.uint32(config.seed))


def train_strategy(config: Config, strategy: str, text: np.ndarray, stop: threading.Event | None, bar) -> Result:
    """用一種策略訓練 steps 步。種子相同，所以每種策略的起點與批次都相同。

    Raises:
        FloatingPointError: 損失變成 NaN 或無限大。
    """
    mesh, rules, rng = strategy_mesh(config, strategy), config.rule_books[strategy], np.random.default_rng(config.seed)
    training, held_out = np.split(text, [9 * len(text) // 10])
    with rule_book(mesh, rules), jax.default_matmul_precision("highest"):  # GPU 與 TPU 也用完整的 float32 相乘
        program = plan(config.llama, config.learning_rate, mesh, rules, config.batch_size, config.sequence_length)
        step = compile_step(program)
        state = initial_state(program, config)
        result = Result(strategy, mesh, rules, read_collectives(step.as_text(), mesh))
        while len(result.losses) < config.steps and not (stop and stop.is_set() and result.losses):
            inputs, targets = (distribute(x, program.tokens.sharding) for x in sample_batch(training, rng, config))
            start = time.perf_counter()
            state, loss, gradients = step(state, inputs, targets)
            result.losses.append(float(loss))
            result.seconds.append(time.perf_counter() - start)
            if not math.isfinite(result.losses[-1]):
                raise FloatingPointError(f"{strategy} 第 {len(result.losses)} 步的損失不是有限的數")
            bar.set_postfix_str(f"{strategy} 平均損失 {np.mean(result.losses[-5:]):.3f}")
            bar.update()
        parameters, adam = nnx.filter_state(state, nnx.Param), state[1]["opt_state"][0]
        trees = {"parameters": parameters, "gradients": gradients, "moments": (adam["mu"], adam["nu"])}
        result.bytes = {name: device_bytes(tree) for name, tree in trees.items()}
        result.weights = {path[-1]: array[...] for path, array in nnx.to_flat_state(parameters)}
        result.test_loss = evaluate(program, state, held_out, config)
    return result


def train(config: Config, stop: threading.Event | None = None, progress: bool = True) -> dict[str, Result]:
    """每一種策略各訓練一次；single 排第一，是其他策略的對照。stop 被設定時，停在兩步之間，至少走一步。"""
    text, results = read_text(), {}
    with tqdm(total=config.steps * len(config.rule_books), desc="訓練", unit="步", disable=not progress or None) as bar:
        for strategy in config.rule_books:
            if not (stop and stop.is_set() and results):
                results[strategy] = train_strategy(config, strategy, text, stop, bar)
    return results


def evaluate(program: Program, state: nnx.State, text: np.ndarray, config: Config) -> float:
    """沒看過的文字上，平均一個位元組的損失；批次固定，所有策略與隨機種子都用同一批。"""
    batch = (distribute(x, program.tokens.sharding) for x in sample_batch(text, np.random.default_rng(0), config))
    loss = jax.jit(lambda state, *batch: cross_entropy(nnx.merge(program.graphdef, state)[0], *batch))
    return float(loss(state, *batch))


# 8. 記憶體帳：真正的 Llama，只編譯，不配置 -----------------------------------------------------------


def count_parameters(llama: Llama) -> int:
    sizes = asdict(llama)
    return sum(math.prod(sizes[axis] for axis in axes) for axes in WEIGHTS.values())


def ledger_row(llama: Llama, mesh: Mesh, rules: dict) -> dict[str, int]:
    """編譯一整個訓練步驟，讀出每個裝置的位元組；陣列全是抽象的，不佔記憶體。"""
    with rule_book(mesh, rules):
        program = plan(llama, Config.learning_rate, mesh, rules, mesh.devices.size, LEDGER_TOKENS)
        step = compile_step(program, execute=False)
    memory = step.memory_analysis()
    return {
        "state": memory.argument_size_in_bytes,  # 權重與動量
        "gradients": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }


def ledger(config: Config, stop: threading.Event | None = None) -> list[dict]:
    """每張 Mesh、每種策略一列；除不盡的那一列寫明哪一個軸。做完幾列算幾列。"""
    llama, rows = LLAMAS[config.ledger], []
    meshes = [("single", "1x1", config.rule_books["single"])]
    for mesh in config.ledger_meshes:
        meshes += [(name, mesh, rules) for name, rules in config.rule_books.items() if name != "single"]
    with tqdm(meshes, desc="編譯", unit="種") as bar:
        for strategy, name, rules in bar:
            if stop and stop.is_set() and rows:
                break
            shape = parse_mesh(name)
            problem = indivisible(rules, axis_sizes(llama, math.prod(shape.values()), LEDGER_TOKENS), shape)
            mesh = make_mesh(shape)
            row = {"indivisible": problem} if problem else ledger_row(llama, mesh, rules)
            rows.append({"model": config.ledger, "mesh": name, "strategy": strategy, **row})
            bar.set_postfix_str(f"{name} {strategy}")
    return rows


def fitting_chips(size: int) -> str:
    """放得下 size 個位元組的晶片；1 GB 是 10 的 9 次方。"""
    return "、".join(str(capacity) for capacity in CHIPS.values() if size <= capacity * 1e9) or "都不行"


def markdown(header: str, rows: list[list[str]]) -> str:
    """Markdown 表格；header 是用 | 分開的欄名。"""
    columns = header.split(" | ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) + "\n" for line in lines)


def ledger_table(rows: list[dict]) -> str:
    """Markdown 表格，單位是一個裝置的 GB。"""
    lines = []
    for row in rows:
        if "indivisible" in row:
            axis, parts = row["indivisible"]
            cells = [f"`{axis}` 切不成 {parts} 份", "", "", "", "", ""]
        else:
            lasting = row["state"] + row["gradients"]
            cells = [*(f"{size / 1e9:.2f}" for size in (row["state"], row["gradients"], lasting))]
            cells += [fitting_chips(lasting), f"{row['temporary'] / 1e9:.2f}"]
            cells.append(fitting_chips(lasting + row["temporary"]))
        lines.append([row["mesh"], f"`{row['strategy']}`", *cells])
    parameters = count_parameters(LLAMAS[rows[0]["model"]])
    gb = parameters * 2 / 1e9
    header = "Mesh | 策略 | 權重 + 動量 | 梯度 | 合計 | 放得下的晶片 (GB) | 編譯器的暫存 | 連暫存也放得下"
    return (
        f"{markdown(header, lines)}\n"
        f"{rows[0]['model']}：{parameters:,} 個參數。全用 bfloat16：權重 {gb:.1f} + 梯度 {gb:.1f} + Adam {2 * gb:.1f}"
        f" = {4 * gb:.1f} GB。權重的正本與動量用 float32 (混合精度)："
        f"bfloat16 的權重與梯度 {2 * gb:.1f} + float32 的正本與動量 {6 * gb:.1f} = {8 * gb:.1f} GB。\n"
    )


# 9. 表格與圖 -----------------------------------------------------------------------------------------


def strategy_rows(results: dict[str, Result]) -> dict[str, dict]:
    """metrics.json 的 strategies：每種策略一列。"""
    rows = {}
    for name, result in results.items():
        summary: dict[tuple, list[int]] = {}
        for collective in result.collectives:
            summary.setdefault((collective.operation, "+".join(collective.axes)), []).append(collective.bytes)
        keys = ("operation", "axes", "count", "bytes")
        rows[name] = {
            "mesh": "x".join(map(str, result.mesh.devices.shape)),
            "rules": {axis: target for axis, target in result.rules.items() if target},
            "bytes": result.bytes,
            "collectives": [dict(zip(keys, (*key, len(b), sum(b)), strict=True)) for key, b in summary.items()],
            "losses": result.losses,
            "test_loss": result.test_loss,
            "max_relative_difference": float(result.difference(results["single"]).max()),
            "seconds_per_step": float(np.median(result.seconds)),
        }
    return rows


def comparison_table(rows: dict[str, dict]) -> str:
    """Markdown 表格：一個裝置的位元組、集體通訊，與 single 的差。"""
    lines = []
    for name, row in rows.items():
        sizes = (f"{row['bytes'][key] / 1e3:,.1f}" for key in ("parameters", "gradients", "moments"))
        calls = "、".join(f"{c['operation']} × {c['count']} ({c['axes']})" for c in row["collectives"]) or "沒有"
        traffic = sum(c["bytes"] for c in row["collectives"]) / 1e3
        end = f"{1e3 * row['seconds_per_step']:.0f}", f"{row['max_relative_difference']:.1e}"
        lines.append([f"`{name}`", *sizes, calls, f"{traffic:,.1f}", *end])
    header = "策略 | 參數 (KB) | 梯度 (KB) | Adam (KB) | 集體通訊：次數 (軸) | 通訊量 (KB) | 一步 (毫秒) | 最大相對差"
    return markdown(header, lines)


def translation_table(result: Result) -> str:
    """每個權重：邏輯軸 → 規則 → Mesh 軸 → 一個裝置上的形狀；切法從陣列讀出來。"""
    lines = []
    for name, axes in WEIGHTS.items():
        array = result.weights[name]
        spec = ", ".join("+".join(mesh_axes(entry)) or "None" for entry in translate(axes, result.rules))
        shard = array.sharding.shard_shape(array.shape)
        lines.append([name, ", ".join(axes), spec, str(array.shape), str(shard)])
    return markdown("權重 | 邏輯軸 | PartitionSpec | 整個的形狀 | 一個裝置上的形狀", lines)


def show_strategy(result: Result) -> None:
    """在終端機印出翻譯表，並畫出 gate (第 0 層) 的每一塊在哪個裝置上。"""
    rules = {axis: "+".join(mesh_axes(target)) for axis, target in result.rules.items() if target}
    print(f"\n{result.strategy}：Mesh {dict(result.mesh.shape)}，規則 {rules}\n\n{translation_table(result)}")
    if jax.process_count() == 1:  # 別的主機上的切片，這裡看不到
        print("gate[0]，直的是 embed，橫的是 mlp：")
        jax.debug.visualize_array_sharding(result.weights["gate"][0], use_color=False)


def plot_style() -> None:
    """所有課共用的樣式：白底、色盲也分得清的顏色 (Okabe-Ito)。"""
    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    figure = {"figure.dpi": 110, "figure.facecolor": "white", "figure.constrained_layout.use": True}
    axes = {"axes.prop_cycle": plt.cycler(color=colors), "axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams.update(figure | axes | {"axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False})


def save_figure(figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)


def draw_learning_curve(results: dict[str, Result], config: Config) -> None:
    """上：每種策略的損失，疊在一起；下：與 single 的相對差。"""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=[3, 2])
    for i, (name, result) in enumerate(results.items()):
        steps = np.arange(1, len(result.losses) + 1)
        top.plot(steps, result.losses, color=f"C{i}", lw=9 - 1.5 * i, alpha=0.8, label=name)
        if name != "single":
            difference = np.maximum(result.difference(results["single"]), 1e-9)  # 0 畫不進對數座標
            bottom.semilogy(steps[: len(difference)], difference, ".-", color=f"C{i}")
    bottom.axhline(TARGET_DIFFERENCE, color="0.4", linestyle=":", label=f"target: {TARGET_DIFFERENCE:.0e}")
    top.set(ylabel="loss (nat per byte)", title="Same seed, same batches: the strategies agree")
    bottom.set(xlabel="step", ylabel="relative difference\n(0 drawn at 1e-9)", ylim=(5e-10, 1e-3))
    bottom.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    top.legend()
    bottom.legend()
    save_figure(figure, config.out_dir / "learning_curve.png")


def draw_bytes_and_collectives(rows: dict[str, dict], config: Config) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    names = list(rows)
    start = np.zeros(len(names))
    for i, kind in enumerate(("parameters", "gradients", "moments")):
        sizes = np.array([rows[name]["bytes"][kind] for name in names]) / 1e6
        left.barh(names, sizes, left=start, color=f"C{i}", label="Adam moments" if kind == "moments" else kind)
        start += sizes
    start = np.zeros(len(names))
    for i, operation in enumerate(OPERATIONS):
        calls = [[c for c in rows[name]["collectives"] if c["operation"] == operation] for name in names]
        sizes = np.array([sum(c["bytes"] for c in row) for row in calls]) / 1e6
        if sizes.any():
            right.barh(names, sizes, left=start, color=f"C{i}", label=operation)
        start += sizes
    counts = [sum(c["count"] for c in rows[name]["collectives"]) for name in names]
    for y, (end, count) in enumerate(zip(start, counts, strict=True)):
        right.annotate(f" {count} call{'' if count == 1 else 's'}", (end, y), va="center", fontsize=9)
    left.set(xlabel="MB on one device", title="What one device holds")
    right.set(xlabel="MB per device and step", title="What the compiler added: collectives")
    right.set_xlim(0, 1.2 * max(start.max(), 0.1))
    left.invert_yaxis()
    left.legend(fontsize=9)
    right.legend(fontsize=9)
    save_figure(figure, config.out_dir / "bytes_and_collectives.png")


def draw_placement(result: Result, config: Config) -> None:
    """哪個裝置放哪一塊：Mesh、一批文字、gate 的一層。一塊一個顏色，塊裡的數字是裝置在 Mesh 裡的位置。"""
    sizes, mesh = axis_sizes(config.llama, config.batch_size, config.sequence_length), result.mesh
    figure, (chart, *panels) = plt.subplots(1, 3, figsize=(10, 3.4), width_ratios=[1, 2, 2])
    position = {device: i for i, device in enumerate(mesh.devices.flat)}
    rows, columns = mesh.devices.shape
    for i in range(mesh.devices.size):
        draw_block(chart, (i // columns, i // columns + 1), (i % columns, i % columns + 1), str(i), "0.9")
    chart.set(xlim=(0, columns), ylim=(rows, 0), xlabel=f"model ({columns})", ylabel=f"data ({rows})", title="mesh")
    for axes, title, names in zip(
        panels, ("tokens", "gate (one layer)"), (("batch", "sequence"), ("embed", "mlp")), strict=True
    ):
        shape = tuple(sizes[name] for name in names)
        blocks: dict[tuple, list[int]] = {}
        for device, index in NamedSharding(mesh, translate(names, result.rules)).devices_indices_map(shape).items():
            bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
            blocks.setdefault(bounds, []).append(position[device])
        for i, (bounds, devices) in enumerate(sorted(blocks.items())):
            draw_block(axes, *bounds, " ".join(map(str, sorted(devices))), f"C{i % 6}")
        axes.set(
            xlim=(0, shape[1]), ylim=(shape[0], 0), xlabel=f"{names[1]} ({shape[1]})", ylabel=f"{names[0]} ({shape[0]})"
        )
        axes.set_title(f"{title}: {len(blocks)} block{'s' * (len(blocks) > 1)}")
    for axes in (chart, *panels):
        axes.set(xticks=[], yticks=[])
    figure.suptitle(f"{result.strategy}: numbers are positions in the mesh")
    save_figure(figure, config.out_dir / f"placement_{result.strategy}.png")


def draw_block(axes, rows: tuple[int, int], columns: tuple[int, int], text: str, color: str) -> None:
    (top, bottom), (left, right) = rows, columns
    patch = plt.Rectangle((left, top), right - left, bottom - top, facecolor=color, edgecolor="black", alpha=0.45)
    axes.add_patch(patch)
    axes.text((left + right) / 2, (top + bottom) / 2, text, ha="center", va="center")


def draw_ledger(rows: list[dict], config: Config) -> None:
    """每一列在一顆晶片上要多少；虛線是晶片的容量。"""
    rows = [row for row in rows if "state" in row]
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.38 * len(rows)))
    names, start = [f"{row['mesh']}  {row['strategy']}" for row in rows], np.zeros(len(rows))
    labels = {"state": "weights + Adam moments", "gradients": "gradients", "temporary": "temporary (CPU compiler)"}
    for i, (key, label) in enumerate(labels.items()):
        sizes = np.array([row[key] for row in rows]) / 1e9
        axes.barh(names, sizes, left=start, color=("C0", "C1", "0.8")[i], label=label)
        start += sizes
    for name, capacity in CHIPS.items():
        axes.axvline(capacity, color="0.3", linestyle="--", lw=1)
        axes.text(capacity, -0.8, f"{name}\n{capacity}", ha="center", va="bottom", fontsize=8)
    axes.set(xlabel="GB on one device", ylim=(len(rows) - 0.4, -0.7))
    axes.legend(loc="lower right", fontsize=9, frameon=True, framealpha=1)
    axes.set_title(f"{config.ledger}: one train step, batch = devices, {LEDGER_TOKENS} tokens per sequence", pad=32)
    save_figure(figure, config.out_dir / f"ledger_{config.ledger}.png")


# 10. 命令列與存檔 ------------------------------------------------------------------------------------


def fail(message: str, status: int) -> NoReturn:
    print(f"錯誤：{message}", file=sys.stderr)
    sys.exit(status)


def require(condition: bool, wrong: str, right: str) -> None:
    """條件不成立就印一行「錯誤：哪裡不對；怎樣才對」，以狀態 2 結束。"""
    if not condition:
        fail(f"{wrong}；{right}", status=2)


def require_bounds(config, bounds: dict) -> None:
    """bounds：欄位 → (下限, 上限)，含兩端；nan 不在任何範圍裡。"""
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        right = f"要是 {low} 以上" if high == math.inf else f"要在 {low} 與 {high} 之間"
        require(low <= value <= high, f"--{name.replace('_', '-')} 是 {value}", right)


def parse_config(config_class, description: str):
    """命令列 → config_class；看不懂就印一行錯誤，以狀態 2 結束，不印 tyro 的方框。"""
    sys.stdout.reconfigure(errors="replace")  # 印不出中文的終端機看到問號，不會中斷
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(config_class, description=description)
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        detail = " ".join(re.findall(r"│ (.*?) *│", output.getvalue().split("│ ──")[0]))
        fail(f"看不懂命令列 ({detail})；--help 列出每個旗標", status=2)


def prepare_out_dir(out_dir: Path) -> None:
    """建立 out_dir，並確定寫得進去。"""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()
    except OSError as error:
        fail(f"--out-dir {out_dir} 寫不進去 ({error.strerror})；要是可以寫入的資料夾", status=2)


def stop_on_ctrl_c() -> threading.Event:
    """第一次 Ctrl-C 只設旗標，讓訓練停在乾淨的地方；第二次照常中斷。"""
    stop = threading.Event()

    def handler(*_):
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, handler)
    return stop


def save_metrics(config, train_seconds: float, device: dict, **results) -> None:
    """metrics.json：先寫到暫存檔再改名，中途停電也不會留下半個檔案。"""
    packages = ("jax", "flax", "optax", "gymnasium")
    metrics = {
        "lesson": Path(__file__).resolve().parent.name,
        "seed": config.seed,
        "config": asdict(config),
        "seconds": {"train": train_seconds, "total": time.perf_counter() - PROCESS_START},
        "device": device,
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        **results,
    }
    temporary = config.out_dir / "metrics.tmp"
    temporary.write_text(
        json.dumps(metrics, ensure_ascii=False, indent=2, default=str, allow_nan=False), encoding="utf-8"
    )
    temporary.replace(config.out_dir / "metrics.json")


def finish(config, interrupted: bool, progress: str) -> None:
    """最後一行：結果在哪裡；被中斷時結束狀態是 130。"""
    if interrupted:
        print(f"已中斷：{progress}，目前的結果存在 {config.out_dir}")
        sys.exit(130)
    print(f"結果存在 {config.out_dir}")


def main() -> None:
    config = parse_config(Config, "第 5 課：Mesh 與切分規則，從一顆晶片到許多晶片")
    check(config)
    start_devices(config)
    prepare_out_dir(config.out_dir)
    # 幾個行程時，只有收到 Ctrl-C 的那一個會停，其餘的會永遠等它：不接管，照常中斷
    stop = stop_on_ctrl_c() if jax.process_count() == 1 else threading.Event()
    plot_style()
    device = {"platform": jax.default_backend(), "count": jax.device_count()}
    if config.ledger != "none":
        rows = ledger(config, stop)
        table, parameters = ledger_table(rows), count_parameters(LLAMAS[config.ledger])
        (config.out_dir / "ledger.md").write_text(table, encoding="utf-8")
        draw_ledger(rows, config)
        save_metrics(config, time.perf_counter() - PROCESS_START, device, ledger=rows)
        published = PUBLISHED_PARAMETERS[config.ledger]
        print(
            f"{table}\n{'達標' if parameters == published else '未達標'}：{parameters:,} 個參數（目標 {published:,}）"
        )
        return finish(config, stop.is_set(), f"編譯了 {len(rows)} 種")

    start = time.perf_counter()
    results = train(config, stop, progress=jax.process_index() == 0)
    seconds = time.perf_counter() - start
    if jax.process_index() > 0:  # 檔案與畫面交給第 0 個行程
        return None
    rows = strategy_rows(results)
    difference = max(row["max_relative_difference"] for row in rows.values())
    draw_learning_curve(results, config)
    draw_bytes_and_collectives(rows, config)
    for name, result in results.items():
        lines = "\n".join(collective.line for collective in result.collectives)
        (config.out_dir / f"collectives_{name}.txt").write_text(lines + "\n", encoding="utf-8")
        if name != "single":
            draw_placement(result, config)
            show_strategy(result)
    last = [*rows.values()][-1]  # device_kb、collective_kb 是最後一種策略的
    save_metrics(
        config, seconds, device, strategies=rows, max_relative_difference=difference,
        device_kb=sum(last["bytes"].values()) / 1e3,
        collective_kb=sum(c["bytes"] for c in last["collectives"]) / 1e3,
    )  # fmt: skip
    test_losses = "、".join(f"{name} {row['test_loss']:.5f}" for name, row in rows.items())
    print(f"\n{comparison_table(rows)}\n沒看過的文字上的損失：{test_losses}")
    figure = f"{len(rows)} 種策略的損失與 single 的最大相對差 {difference:.1e}"
    print(f"{'達標' if difference <= TARGET_DIFFERENCE else '未達標'}：{figure}（目標 {TARGET_DIFFERENCE:.0e} 以下）")
    finish(config, stop.is_set(), f"訓練了 {sum(len(result.losses) for result in results.values())} 步")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except FloatingPointError as error:
        fail(f"{error}；把學習率調小再試", status=1)
