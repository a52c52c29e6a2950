"""記憶體帳：真正的 Llama，只編譯，不配置。每張 Mesh、每種策略一列，一顆晶片要多少位元組。"""

import functools
import time
from dataclasses import fields, replace
from pathlib import Path

import jax
import numpy as np
from chips import NAMES, compiler, describe
from llama import LLAMAS, PUBLISHED_PARAMETERS, count_parameters
from parsing import mesh_size
from sharding_devices import side_by_side

import lesson
from lesson_extras import figure, markdown_table

TOKENS = 2048  # 一個序列的長度；批次等於晶片數
CHIPS = {"TPU v5e": 16, "TPU v6e": 32, "H100": 80, "TPU v5p": 95}  # HBM，GB
MAX_FAKE_DEVICES = 512
# 同一步、同一顆晶片，換一件事再編譯一次，看暫存那一欄怎麼變
CHECKS = {
    ("1x1", "single, float32"): {"dtype": "float32"},
    ("1x1", "single, no gradients returned"): {"return_gradients": False},
}
OWN_FLAGS = {"strategies", "rules", "ledger", "ledger_meshes", "compile_for", "seed", "out_dir"}  # 其餘的是訓練用的


def check(config) -> None:
    """旗標彼此不合就丟出 ValueError。"""
    for mesh in config.ledger_meshes:
        if (size := mesh_size(mesh)) > MAX_FAKE_DEVICES:
            raise ValueError(f"--ledger-meshes 的 {mesh} 有 {size} 個裝置；最多 {MAX_FAKE_DEVICES} 個")
    if config.ledger == "none":
        if config.ledger_meshes != type(config).ledger_meshes:
            raise ValueError(f"--ledger-meshes 只有記憶體帳用得到；要和 --ledger {' 或 '.join(LLAMAS)} 一起寫")
        return
    if not config.ledger_meshes:
        raise ValueError("--ledger-meshes 是空的；至少要一張 Mesh，例如 4x2")
    for field in fields(config):
        if field.name not in OWN_FLAGS and getattr(config, field.name) != field.default:
            flag = "--" + field.name.replace("_", "-")
            raise ValueError(f"--ledger {config.ledger} 與 {flag} 一起用；記憶體帳不訓練，不要寫 {flag}")


def memory(compile_step) -> dict:
    """編譯一個訓練步驟 → 一個裝置上的位元組；TPU 的編譯器自己就拒絕放不下的。"""
    try:
        analysis = compile_step().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"too_big": True}
    return {
        "state": analysis.argument_size_in_bytes,  # 權重與動差
        "gradients": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporary": analysis.temp_size_in_bytes,
    }


def run(run: lesson.Run, config, books: dict[str, dict], measure) -> None:
    """--ledger：每一列是 measure(llama, mesh, rules, 交不交出梯度, 晶片)，見 ledger_row。被中斷時，做完幾列算幾列。"""
    start, llama, chip = time.perf_counter(), LLAMAS[config.ledger], config.compile_for
    if chip != "none":
        describe(chip, {"data": 1})  # 沒有它的編譯器，現在就說
    others = [(mesh, name) for mesh in dict.fromkeys(config.ledger_meshes) for name in books if name != "single"]
    # float32 的那一列是拿來看 CPU 編譯器的
    checks = [place for place, what in CHECKS.items() if chip == "none" or "dtype" not in what]
    places = [("1x1", "single"), *checks, *others]
    jobs = []
    for mesh, name in places:
        what = CHECKS.get((mesh, name), {})
        shape = replace(llama, dtype=what.get("dtype", llama.dtype))
        rules = books["single" if what else name]
        gradients = what.get("return_gradients", True)
        jobs.append(functools.partial(measure, shape, mesh, rules, gradients, chip))
    names = {"model": config.ledger, "chip": chip, "compiler": compiler(chip)}
    rows = [
        {**names, "mesh": mesh, "strategy": name, **row}
        for (mesh, name), row in zip(places, side_by_side(jobs, run.stop), strict=True)
        if row is not None
    ]
    run.require_learnt(rows)
    run.save_metrics(config, time.perf_counter() - start, ledger=rows)
    table = ledger_table(rows)
    lesson.save(config.out_dir / "ledger.md", table.encode())
    of_chip = "" if chip == "none" else f"_{chip}"
    if any("state" in row for row in rows):
        draw_ledger(rows, config.out_dir / f"ledger_{config.ledger}{of_chip}.png")
    parameters, published = count_parameters(llama), PUBLISHED_PARAMETERS[config.ledger]
    reached = "達標" if parameters == published else "未達標"
    print(f"{table}\n{reached}：{parameters:,} 個參數（目標 {published:,}）")
    run.finish(config, f"編譯了 {len(rows)} 種" if len(rows) < len(places) else "")


def fitting_chips(size: int) -> str:
    """放得下 size 個位元組的晶片；1 GB 是 10 的 9 次方。"""
    return "、".join(str(capacity) for capacity in CHIPS.values() if size <= capacity * 1e9) or "都不行"


def ledger_table(rows: list[dict]) -> str:
    """Markdown 表格，單位是一個裝置的 GB。CPU 編譯器的暫存有一大塊是它自己的 (見 README)，不拿來判斷放不放得下。"""
    chip = NAMES[rows[0]["chip"]]
    header = ["Mesh", "策略", "權重 + 動差", "交出來的梯度", "合計"]
    header += (
        [f"{chip} 編譯器的暫存", f"放得進 {CHIPS[chip]} GB"]
        if chip in CHIPS
        else ["放得下的晶片 (GB)", "CPU 編譯器的暫存"]
    )
    lines = []
    for row in rows:
        if "indivisible" in row:
            axis, parts = row["indivisible"]
            cells = [f"`{axis}` 切不成 {parts} 份", *[""] * 4]
        elif "too_big" in row:
            cells = ["編譯器說放不下", *[""] * 3, "否"]
        else:
            lasting, temporary = row["state"] + row["gradients"], row["temporary"]
            cells = [f"{size / 1e9:.2f}" for size in (row["state"], row["gradients"], lasting)]
            if chip in CHIPS:
                fits = "是" if lasting + temporary <= CHIPS[chip] * 1e9 else "否"
                cells += [f"{temporary / 1e9:.2f}", fits]
            else:
                cells += [fitting_chips(lasting), f"{temporary / 1e9:.2f}"]
        lines.append([row["mesh"], f"`{row['strategy']}`", *cells])
    parameters = count_parameters(LLAMAS[rows[0]["model"]])
    gb = parameters * 2 / 1e9
    return (
        f"{markdown_table(header, lines)}\n"
        f"{rows[0]['model']}：{parameters:,} 個參數。全用 bfloat16：權重 {gb:.1f} + 梯度 {gb:.1f} + Adam {2 * gb:.1f}"
        f" = {4 * gb:.1f} GB。權重的正本與動差用 float32 (混合精度)："
        f"bfloat16 的權重與梯度 {2 * gb:.1f} + float32 的正本與動差 {6 * gb:.1f} = {8 * gb:.1f} GB。"
        f"編譯器是 {rows[0]['compiler']}。\n"
    )


def draw_ledger(rows: list[dict], path: Path) -> None:
    """每一列在一顆晶片上要多少；虛線是晶片的容量。"""
    compiled = [row for row in rows if "state" in row]
    names, start = [f"{row['mesh']}  {row['strategy']}" for row in compiled], np.zeros(len(compiled))
    labels = {
        "state": "weights + Adam moments",
        "gradients": "gradients",
        "temporary": f"temporary ({NAMES[rows[0]['chip']]} compiler)",
    }
    with figure(path, figsize=(9, 0.8 + 0.38 * len(compiled))) as (_, axes):
        for color, (key, label) in zip(("C0", "C1", "0.8"), labels.items(), strict=True):
            sizes = np.array([row[key] for row in compiled]) / 1e9
            axes.barh(names, sizes, left=start, color=color, label=label)
            start += sizes
        chip = NAMES[rows[0]["chip"]]
        for name, capacity in ({chip: CHIPS[chip]} if chip in CHIPS else CHIPS).items():
            axes.axvline(capacity, color="0.3", linestyle="--", lw=1)
            axes.text(capacity, -0.8, f"{name}\n{capacity}", ha="center", va="bottom", fontsize=8)
        axes.set(xlabel="GB on one device", ylim=(len(compiled) - 0.4, -0.7))
        axes.legend(loc="lower right", fontsize=9, frameon=True, framealpha=1)
        title = f"{rows[0]['model']}: one train step, batch = devices, {TOKENS} tokens per sequence"
        axes.set_title(title, pad=32)
