"""替手邊沒有的晶片編譯：不必有那種晶片，裝了它的編譯器就行 (jax[cuda13] 或 jax[tpu])。只編譯，不執行。

JAX 的說明：https://docs.jax.dev/en/latest/aot.html。MaxText 的 train_compile.py 也這樣替 TPU 先編譯，看放不放得下。
"""

import functools
import importlib.metadata
import math
import os
import time
from pathlib import Path

from collectives import summarize
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh
from parsing import mesh_size
from sharding_devices import side_by_side
from traffic import read_chip_collectives, save_collectives, table_cells

import lesson
from lesson_extras import markdown_table

NAMES = {"none": "CPU", "h100": "H100", "v5p": "TPU v5p"}
PACKAGES = {"h100": "jax[cuda13]", "v5p": "jax[tpu]"}
COMPILERS = {"none": "jaxlib", "h100": "jax-cuda13-pjrt", "v5p": "libtpu"}
H100 = Path(__file__).resolve().parent / "h100.txtpb"  # 給編譯器看的規格
GPUS_PER_HOST = 8
V5P_SHAPES = {1: "2x2x1", 2: "2x2x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}  # 個數 → 排法
NOT_ON_A_TPU = {  # libtpu 不要上網問自己是哪一台主機；不用晶片，所以幾個行程可以同時用它
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}
UNUSED = ("coordinator", "num_processes", "process_id", "seed", "steps", "learning_rate")  # 訓練才用得到


def check(config) -> None:
    """旗標彼此不合就丟出 ValueError；和 --ledger 一起用的，ledger.check 也看過。"""
    if config.compile_for == "none":
        return
    if config.ledger == "none":
        for name in UNUSED:
            if getattr(config, name) != getattr(type(config), name):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"--compile-for {config.compile_for} 與 {flag} 一起用；只編譯、不訓練，不要寫 {flag}")
        if not config.rules and set(config.strategies) <= {"single"}:
            raise ValueError("--compile-for 看的是通訊，single 沒有通訊；--strategies 至少再寫一種")
    for mesh in [config.mesh] if config.ledger == "none" else config.ledger_meshes:
        if (size := mesh_size(mesh)) not in V5P_SHAPES:
            right = "、".join(map(str, V5P_SHAPES))
            raise ValueError(f"--compile-for 的 Mesh {mesh} 有 {size} 個裝置；要是 {right} 個")


def describe(chip: str, shape: dict[str, int]) -> Mesh:
    """chip 的**描述**排成的 Mesh；編譯器認得，只是不能執行。

    Raises:
        lesson.LessonError: 這裡沒有它的編譯器，或編譯器起不來。
    """
    count = math.prod(shape.values())
    try:
        if chip == "v5p":
            os.environ.update(NOT_ON_A_TPU)
            described = topologies.get_topology_desc(f"v5:{V5P_SHAPES[count]}", "tpu")
        else:
            hosts, gpus = max(1, count // GPUS_PER_HOST), min(count, GPUS_PER_HOST)
            options = {"topology": f"1x{hosts}x{gpus}", "target_config": H100.read_text(encoding="utf-8")}
            described = topologies.get_topology_desc("H100", "cuda", **options)
    except RuntimeError as error:
        wrong = f"這裡用不了 {NAMES[chip]} 的編譯器 ({str(error).splitlines()[0]})"
        right = f'沒有裝就先 pip install "{PACKAGES[chip]}"，版本同 requirements.txt 的 jax'
        raise lesson.LessonError(f"{wrong}；{right}", 2) from error
    sizes = tuple(shape.values())  # 64 顆 v5p 排成 4x4x4：8x8 的一個軸要跨過方塊的一個邊，所以准它拆
    devices = mesh_utils.create_device_mesh(sizes, described.devices[:count], allow_split_physical_axes=True)
    return Mesh(devices, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def compiler(chip: str) -> str:
    """編譯器的套件與版本。"""
    found = next(importlib.metadata.distributions(name=COMPILERS[chip]), None)
    return f"{COMPILERS[chip]} {found.version if found else '(版本不明)'}"


def list_collectives(run: lesson.Run, config, books: dict[str, dict], compile_for) -> None:
    """--compile-for：compile_for(config, rules) → (編譯好的程式, Mesh)。每種策略一列，看編譯器加了什麼通訊。"""
    start, chip = time.perf_counter(), config.compile_for
    books = {name: rules for name, rules in books.items() if name != "single"}
    jobs = [functools.partial(compile_for, config, rules) for rules in books.values()]
    done = {name: result for name, result in zip(books, side_by_side(jobs, run.stop), strict=True) if result}
    run.require_learnt(done)
    found = {name: read_chip_collectives(program.as_text(), mesh) for name, (program, mesh) in done.items()}
    names = {"chip": chip, "compiler": compiler(chip)}
    rows = [names | {"strategy": name, "collectives": summarize(lines)} for name, lines in found.items()]
    run.save_metrics(config, time.perf_counter() - start, compiled=rows)
    save_collectives({f"{name}_{chip}": lines for name, lines in found.items()}, config.out_dir)
    print(collectives_table(rows))
    run.finish(config, f"編譯了 {len(rows)} 種" if len(rows) < len(jobs) else "")


def collectives_table(rows: list[dict]) -> str:
    """Markdown 表格：每種策略，那種晶片的編譯器加了什麼通訊。"""
    lines = [[f"`{row['strategy']}`", *table_cells(row["collectives"])] for row in rows]
    table = markdown_table(("策略", "集體通訊：次數 (軸)", "通訊量 (KB)"), lines)
    return f"{table}\n替 {NAMES[rows[0]['chip']]} 編譯；編譯器是 {rows[0]['compiler']}。\n"
