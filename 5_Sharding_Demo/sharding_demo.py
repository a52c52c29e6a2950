"""第 5 課：Mesh 與切分規則，從一顆晶片到許多晶片 (模組六)。

問題：80 億個參數的模型，訓練起來為什麼一顆晶片不夠？Mesh 與 logical_axis_rules 怎麼解決？切開之後，算出來的還一樣嗎？

    python 5_Sharding_Demo/sharding_demo.py                        五種策略各訓練 20 步，比位元組、通訊與損失
    python 5_Sharding_Demo/sharding_demo.py --mesh 2x4             換一張地圖
    python 5_Sharding_Demo/sharding_demo.py --rules batch=data,mlp=model    自己寫一本規則手冊
    python 5_Sharding_Demo/sharding_demo.py --ledger llama3-8b     真正的 Llama 3 8B：每顆晶片要多少記憶體
    python 5_Sharding_Demo/sharding_demo.py --compile-for h100     不訓練，替手邊沒有的晶片編譯，看通訊

沒有 GPU 或 TPU 時，腳本請 XLA 把 CPU 當成八個假裝置；有的話就用真的，個數不是八個就要改 --mesh。
結果在 outputs/：learning_curve.png、bytes_and_collectives.png、placement_*.png、collectives_*.txt、metrics.json。
模型在 llama.py，文字在 byte_text.py，從編譯好的程式讀出通訊在 collectives.py，記憶體帳在 ledger.py，
替手邊沒有的晶片編譯在 chips.py。

出處：張量平行：Shoeybi 等 (2019)，arXiv 1909.08053，第 3 節。切分最佳化器狀態與權重 (ZeRO、FSDP)：
Rajbhandari 等 (2020)，arXiv 1910.02054，第 5 節。由標註切分整個程式 (GSPMD)：Xu 等 (2021)，arXiv 2105.04663。
"""

import lesson

RUN = lesson.Run(__name__, __file__)  # 從這裡開始計時，Ctrl-C 也從這裡開始有人接

import contextlib
import functools
import itertools
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import chips
import jax
import ledger
import numpy as np
import sharding_demo_extras as extras
from byte_text import PROMPT, decode, read_text, write
from collectives import Collective, read_collectives
from flax import nnx
from hosts import check_processes
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from llama import ACTIVATIONS, AXES, LLAMAS, WEIGHTS, Llama, axis_sizes, create, cross_entropy
from parsing import MESH_AXES, mesh_size, parse_mesh, parse_rules
from sharding_devices import progress_bar, side_by_side, start_devices
from traffic import save_collectives

TARGET_DIFFERENCE = 1e-4
BYTES = 256  # 詞彙表：一個位元組一個詞元
# CPU 上一個程式只跑二十幾步，編譯得快比跑得快重要：XLA 舊的程式碼產生器，最佳化少做一點
COMPILE_QUICKLY = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 1}

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
class Config:
    """超參數的唯一來源：命令列、README 的表格與測試都讀這裡。"""

    strategies: tuple[Literal[*RULES], ...] = tuple(RULES)  # 要跑的策略；single 是對照，一定會先跑
    rules: str = ""  # 自己的規則手冊，例如 batch=data,mlp=model；兩個軸合起來寫 data+model。多跑一種叫 custom 的策略
    mesh: str = "4x2"  # Mesh 的形狀：data 軸 x model 軸
    ledger: Literal["none", *LLAMAS] = "none"  # 不訓練，改算這個模型的記憶體帳
    ledger_meshes: tuple[str, ...] = ("8x1", "1x8", "4x2", "8x8")  # 記憶體帳要算哪些 Mesh；1x1 的 single 一定會算
    compile_for: Literal["none", "h100", "v5p"] = "none"  # 不訓練，替這種晶片編譯；不必有它，要有它的編譯器
    coordinator: str = ""  # 多台主機：第 0 個行程的 HOST:PORT；auto 表示由 TPU 或 Slurm 的環境決定
    num_processes: Annotated[int, (1, 10_000)] = 1  # 多台主機：總共幾個行程
    process_id: Annotated[int, (0, 9_999)] = 0  # 多台主機：這是第幾個行程，從 0 開始
    seed: Annotated[int, (0, 2**32 - 1)] = 42  # 隨機種子 (seed)
    steps: Annotated[int, (1, 10**6)] = 20  # 每種策略訓練幾步
    batch_size: Annotated[int, (1, 10**5)] = 16  # 一步用幾段文字
    sequence_length: Annotated[int, (1, 1024)] = 128  # 一段文字的長度，單位是位元組
    num_layers: Annotated[int, (1, 100)] = 2  # Transformer 的層數
    embed_dim: Annotated[int, (2, 10**5)] = 128  # 殘差流的寬度 (embed 軸)
    mlp_dim: Annotated[int, (1, 10**6)] = 384  # MLP 中間的寬度 (mlp 軸)
    num_heads: Annotated[int, (1, 10**4)] = 16  # 注意力頭的個數 (heads 軸)
    num_kv_heads: Annotated[int, (1, 10**4)] = 8  # 鍵與值的頭數 (kv_heads 軸)；比 num-heads 少就是 GQA
    learning_rate: Annotated[float, (1e-8, 1e30)] = 1e-3  # Adam 的學習率
    out_dir: Path = Path(__file__).resolve().parent / "outputs"  # 結果放在哪裡

    def __post_init__(self):
        lesson.check_bounds(self)
        check_processes(self)
        extras.check_shape(self, self.llama)
        for mesh in (self.mesh, *self.ledger_meshes):
            parse_mesh(mesh)
        for strategy, rules in rule_books(self).items():
            check_rules(strategy, rules)
        ledger.check(self)
        chips.check(self)

    @property
    def llama(self) -> Llama:
        head_dim = self.embed_dim // self.num_heads
        return Llama(BYTES, self.embed_dim, self.mlp_dim, self.num_heads, self.num_kv_heads, head_dim, self.num_layers)


# 2. 規則手冊：邏輯軸 → Mesh 軸 -----------------------------------------------------------------------


def translate(axes: tuple[str | None, ...], rules: dict) -> PartitionSpec:
    """邏輯軸 → 規則手冊 → 每個維度切在哪個 Mesh 軸上；None 表示不切。"""
    return PartitionSpec(*(rules[axis] if axis else None for axis in axes))


def rule_books(config: Config) -> dict[str, dict]:
    """要跑的策略 → 完整的規則手冊，每個邏輯軸都寫到；single 排第一。"""
    books = {name: RULES[name] for name in ("single", *config.strategies)}
    if config.rules:
        books["custom"] = parse_rules(config.rules)
    return {name: dict.fromkeys(AXES) | book for name, book in books.items()}


def mesh_axes(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """一條規則的目標是一個軸、幾個軸或 None；一律寫成幾個軸。"""
    return target if isinstance(target, tuple) else (target,) if target else ()


def check_rules(strategy: str, rules: dict) -> None:
    """一個陣列的兩個維度不能切在同一個 Mesh 軸上：同一排裝置不能同時排兩個方向。撞到就丟出 ValueError。"""
    for name, axes in (WEIGHTS | ACTIVATIONS).items():
        for (a, b), axis in itertools.product(itertools.combinations(filter(None, axes), 2), MESH_AXES):
            if axis in mesh_axes(rules[a]) and axis in mesh_axes(rules[b]):
                wrong = f"{strategy} 把 {name} 的 {a} 與 {b} 都切在 {axis} 軸上"
                raise ValueError(f"{wrong}；一個陣列的兩個邏輯軸要切在不同的 Mesh 軸，或有一個不切")


def indivisible(rules: dict, sizes: dict[str, int], mesh: dict[str, int]) -> tuple[str, int] | None:
    """第一個除不盡的邏輯軸，以及它要切成幾份；都除得盡就是 None。"""
    for axis in AXES:
        parts = math.prod(mesh[name] for name in mesh_axes(rules[axis]))
        if sizes[axis] % parts:
            return axis, parts
    return None


# 3. 裝置與 Mesh --------------------------------------------------------------------------------------


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
    """在這個 with 裡建立的權重，照 rules 切在 mesh 上；只管這一個執行緒。"""
    with jax.set_mesh(mesh), nnx.logical_axis_rules(tuple(rules.items())):
        yield


def check_divisible(config: Config) -> None:
    """每個維度都要切得開；Mesh 的大小由 start_devices 檢查。"""
    sizes, mesh = axis_sizes(config.llama, config.batch_size, config.sequence_length), parse_mesh(config.mesh)
    for strategy, rules in rule_books(config).items():
        if problem := indivisible(rules, sizes, mesh):
            axis, parts = problem
            where = " × ".join(f"{name} 軸 {mesh[name]}" for name in mesh_axes(rules[axis]))
            wrong = f"{strategy} 把 {axis} 的 {sizes[axis]} 切成 {parts} 份 ({where})，除不盡"
            raise lesson.LessonError(f"{wrong}；要是 {parts} 的倍數", 2)


# 4. 網路在 llama.py：它只說每個維度叫什麼名字；create 建立模型與 Adam --------------------------------


# 5. 訓練的一步：編譯成一個程式 -----------------------------------------------------------------------


class Program(NamedTuple):
    """一種策略編譯之前的樣子；全是抽象的形狀與切法，不佔記憶體。"""

    mesh: Mesh
    rules: dict
    graphdef: nnx.GraphDef
    state: nnx.State  # 權重與 Adam 的動差，每個陣列是帶著切法的 jax.ShapeDtypeStruct
    tokens: jax.ShapeDtypeStruct


def plan(llama: Llama, learning_rate: float, mesh: Mesh, rules: dict, batch_size: int, sequence_length: int) -> Program:
    """每個陣列多大、切在哪裡。"""
    with rule_book(mesh, rules):
        graphdef, state = nnx.split(nnx.eval_shape(lambda: create(llama, learning_rate, 0)))
        shardings = nnx.get_named_sharding(state, mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    sharding = NamedSharding(mesh, translate(ACTIVATIONS["tokens"], rules))
    tokens = jax.ShapeDtypeStruct((batch_size, sequence_length), np.int32, sharding=sharding)
    return Program(mesh, rules, graphdef, state, tokens)


def compile_step(program: Program, execute: bool = True, return_gradients: bool = True):
    """一個訓練步驟：正向、反向、Adam。順便把梯度交出來，好量它有多大；平常的訓練不必。"""
    shardings = jax.tree.map(lambda x: x.sharding, program.state)

    def train_step(state, inputs, targets):
        model, optimizer = nnx.merge(program.graphdef, state)
        loss, gradients = nnx.value_and_grad(cross_entropy)(model, inputs, targets)
        gradients = jax.lax.with_sharding_constraint(gradients, nnx.get_partition_spec(gradients))  # 切法同權重
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), loss, gradients if return_gradients else None

    step = jax.jit(train_step, out_shardings=(shardings, None, None), donate_argnums=0)
    highest = jax.default_matmul_precision("highest")  # GPU 與 TPU 也用完整的 float32 相乘
    with rule_book(program.mesh, program.rules), highest:
        lowered = step.lower(program.state, program.tokens, program.tokens)
    return lowered.compile(compile_options(program.mesh, execute))


def compile_options(mesh: Mesh, execute: bool = True) -> dict:
    """CPU 上編譯得快一點，不執行的更不必最佳化；別的晶片照它自己的預設。"""
    if mesh.devices.flat[0].platform != "cpu":
        return {}
    return COMPILE_QUICKLY if execute else {"xla_backend_optimization_level": 0}


def compile_writer(program: Program):
    """(狀態, 提示) → 接著寫的詞元；也編譯成一個程式。"""
    prompt = jax.ShapeDtypeStruct((PROMPT,), np.int32, sharding=NamedSharding(program.mesh, PartitionSpec()))
    writer = jax.jit(lambda state, prompt: write(nnx.merge(program.graphdef, state)[0], prompt))
    with rule_book(program.mesh, program.rules):
        return writer.lower(program.state, prompt).compile(compile_options(program.mesh))


# 6. 訓練 ---------------------------------------------------------------------------------------------


def sample_batch(text: np.ndarray, rng: np.random.Generator, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """隨機的 batch_size 段文字：輸入，與往後一個位元組的目標；形狀都是 (batch_size, sequence_length)。"""
    starts = rng.integers(0, len(text) - config.sequence_length, config.batch_size)
    windows = text[starts[:, None] + np.arange(config.sequence_length + 1)]
    return windows[:, :-1], windows[:, 1:]


def distribute(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """照 like 的切法放到裝置上：每個行程只放自己的裝置要的那幾塊；一台或幾台主機都是這一行。"""
    return jax.make_array_from_callback(array.shape, like.sharding, lambda block: array[block])


def initial_state(program: Program, config: Config) -> nnx.State:
    """抽出起點的權重。照 program 切好：每個裝置只留下自己的那一塊，任何一個裝置都不必放下整個模型。"""
    shardings = jax.tree.map(lambda x: x.sharding, program.state)
    build = jax.jit(lambda seed: nnx.state(create(config.llama, config.learning_rate, seed)), out_shardings=shardings)
    with rule_book(program.mesh, program.rules):
        return build(np.uint32(config.seed))


@dataclass
class Result:
    """一種策略的結果。"""

    strategy: str
    program: Program
    collectives: list[Collective]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # 每一步
    bytes: dict[str, int] = field(default_factory=dict)  # 一個裝置上的參數、梯度、動差
    weights: dict[str, extras.Placed] = field(default_factory=dict)  # 權重的名字 → 它怎麼放
    test_loss: float = math.nan
    samples: list[str] = field(default_factory=list)  # 只有 single：提示，訓練之前、之後接著寫的字


def train_strategy(result: Result, step, state: nnx.State, text: np.ndarray, config: Config, stop, bar) -> nnx.State:
    """用一種策略訓練 steps 步，寫進 result，交出最後的狀態；stop 被設定時，停在兩步之間，至少走一步。

    種子相同，所以每種策略的批次都相同。

    Raises:
        lesson.LessonError: 損失變成 NaN 或無限大。
    """
    rng, program = np.random.default_rng(config.seed), result.program
    while len(result.losses) < config.steps and not (stop and stop.is_set() and result.losses):
        inputs, targets = (distribute(x, program.tokens) for x in sample_batch(text, rng, config))
        start = time.perf_counter()
        state, loss, gradients = step(state, inputs, targets)
        result.losses.append(float(loss))
        result.seconds.append(time.perf_counter() - start)
        if not math.isfinite(result.losses[-1]):
            wrong = f"{result.strategy} 第 {len(result.losses)} 步的損失不是有限的數"
            raise lesson.LessonError(f"{wrong}；把學習率調小再試", 1)
        bar.set_postfix_str(f"{result.strategy} 平均損失 {np.mean(result.losses[-5:]):.3f}")
        bar.update()
    result.bytes, result.weights = extras.measure(*nnx.merge(program.graphdef, state), gradients)
    return state


def train(config: Config, stop: threading.Event | None = None, progress: bool = True) -> dict[str, Result]:
    """每一種策略各訓練一次；single 排第一，是其他策略的對照。stop 被設定時，停在兩步之間。

    起點只抽一次，再照每種策略的切法放上去：這個模型小，一個裝置放得下。
    放不下的模型，每種策略各自呼叫 initial_state，數字一樣。
    """
    text, held_out = read_text()  # 只讀一次：訓練到一半有人改了 README，各策略的文字才不會不同
    programs, results = {}, {}
    for name, rules in rule_books(config).items():
        mesh = strategy_mesh(config, name)
        programs[name] = plan(
            config.llama, config.learning_rate, mesh, rules, config.batch_size, config.sequence_length
        )
    jobs = [functools.partial(initial_state, programs["single"], config)]
    jobs += [functools.partial(compile_writer, programs["single"])]
    jobs += [functools.partial(compile_step, program) for program in programs.values()]
    start, writer, *steps = side_by_side(jobs, stop, progress)
    with progress_bar("訓練", config.steps * len(programs), "步", progress) as bar:
        for (name, program), step in zip(programs.items(), steps, strict=True):
            if stop and stop.is_set():
                break
            state = jax.tree.map(lambda x, like: distribute(np.asarray(x), like), start, program.state)
            results[name] = Result(name, program, read_collectives(step.as_text(), program.mesh))
            state = train_strategy(results[name], step, state, text, config, stop, bar)
            if name == "single":
                prompt = held_out[:PROMPT]
                results[name].samples = [decode(x) for x in (prompt, writer(start, prompt), writer(state, prompt))]
            results[name].test_loss = evaluate(step, state, held_out, program, config)
    return results


# 7. 評估 ---------------------------------------------------------------------------------------------


def evaluate(step, state: nnx.State, text: np.ndarray, program: Program, config: Config) -> float:
    """沒看過的文字上，平均一個位元組的損失；批次固定，所有策略與隨機種子都用同一批。

    借用編譯好的訓練步驟：它回報的是更新之前的損失，所以更新之後的狀態丟掉就好；state 交出去就不能再用。
    """
    batch = (distribute(x, program.tokens) for x in sample_batch(text, np.random.default_rng(0), config))
    _, loss, _ = step(state, *batch)
    return float(loss)


# 8. 主程式 -------------------------------------------------------------------------------------------


def ledger_row(llama: Llama, mesh: str, rules: dict, return_gradients: bool = True, chip: str = "none") -> dict:
    """記憶體帳的一列：編譯一整個訓練步驟，陣列全是抽象的；除不盡就寫明是哪一個軸、切幾份。"""
    shape, batch_size = parse_mesh(mesh), mesh_size(mesh)
    if problem := indivisible(rules, axis_sizes(llama, batch_size, ledger.TOKENS), shape):
        return {"indivisible": problem}
    devices = make_mesh(shape) if chip == "none" else chips.describe(chip, shape)
    program = plan(llama, Config.learning_rate, devices, rules, batch_size, ledger.TOKENS)
    return ledger.memory(lambda: compile_step(program, execute=False, return_gradients=return_gradients))


def compile_for(config: Config, rules: dict) -> tuple:
    """替 --compile-for 的晶片編譯一種策略的訓練步驟 → (程式, Mesh)。"""
    mesh = chips.describe(config.compile_for, parse_mesh(config.mesh))
    program = plan(config.llama, config.learning_rate, mesh, rules, config.batch_size, config.sequence_length)
    return compile_step(program, execute=False), mesh


def main() -> None:
    config = lesson.parse(Config, "第 5 課：Mesh 與切分規則，從一顆晶片到許多晶片")
    meshes = config.ledger_meshes if config.ledger != "none" else [config.mesh]
    start_devices(config, max(map(mesh_size, meshes)) if config.compile_for == "none" else 1)
    if config.ledger != "none":
        return ledger.run(RUN, config, rule_books(config), ledger_row)
    check_divisible(config)
    if config.compile_for != "none":
        return chips.list_collectives(RUN, config, rule_books(config), compile_for)
    start = time.perf_counter()
    results = train(config, RUN.stop, progress=jax.process_index() == 0)
    RUN.require_learnt(results)
    if jax.process_index() > 0:
        return None  # 檔案與畫面交給第 0 個行程
    metrics = extras.metrics(results)
    RUN.save_metrics(config, time.perf_counter() - start, **metrics)
    save_collectives({name: result.collectives for name, result in results.items()}, config.out_dir)
    extras.draw(results, metrics["strategies"], config.out_dir, TARGET_DIFFERENCE)
    extras.remove_old({*RULES, "custom"} - results.keys(), config.out_dir)
    extras.show(results, metrics)
    difference = metrics["max_relative_difference"]
    reached = "達標" if difference <= TARGET_DIFFERENCE else "未達標"
    figure = f"{len(results)} 種策略的損失與 single 的最大相對差 {difference:.1e}"
    compared = f"{reached}：{figure}（目標 {TARGET_DIFFERENCE:.0e} 以下）"
    print(compared if len(results) > 1 else "只跑了 single，沒有可以比的")
    steps = sum(len(result.losses) for result in results.values())
    undone = steps < config.steps * len(rule_books(config))
    RUN.finish(config, f"訓練了 {steps} 步" if undone else "")


if __name__ == "__main__":
    RUN(main)
