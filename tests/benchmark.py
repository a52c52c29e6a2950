"""把一課當成使用者那樣整個執行，量時間、記憶體與結果；README 裡的每個數字都從這裡來。

python tests/benchmark.py 3_Pendulum                   種子 0 到 9，印出來
python tests/benchmark.py 3_Pendulum --write           並寫進 figures/results.json 與 README 的結果表
python tests/benchmark.py 3_Pendulum --compare --write    跑 --compare，更新比較圖與比較表
python tests/benchmark.py 3_Pendulum --trials --write     跑 README 試驗表裡還沒有紀錄的列，更新表中的數字
python tests/benchmark.py --all --write                每一課的結果，與專案 README 的總表
python tests/benchmark.py --all --compare --trials --write    每一課的比較與試驗，全部重跑
"""

import argparse
import concurrent.futures
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lessons import (
    COMPARISONS,
    CONSTANTS,
    FRONT_PAGE,
    HIGHER_IS_BETTER,
    LESSONS,
    RESULTS,
    ROOT,
    block,
    config_table,
    defaults,
    environment,
    load,
    metrics,
    replace_block,
    script,
)

SEEDS = range(10)


def final(value: float | list[float]) -> float:
    """每輪一個數字的，取最後一輪。"""
    return value[-1] if isinstance(value, list) else value


def run_once(lesson: str, flags: str, out_dir: Path, env: dict[str, str] | None = None) -> dict:
    """一個完整的行程；時間從啟動算到結束，記憶體是作業系統記的最大值。"""
    command = [sys.executable, str(script(lesson)), *flags.split(), "--out-dir", str(out_dir)]
    start = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status != 0:
        sys.exit(f"{' '.join(command)}\n{errors.decode()}")
    recorded = metrics(out_dir)
    return {
        "seed": recorded["seed"],
        "total_seconds": round(seconds, 2),
        "train_seconds": round(recorded["seconds"]["train"], 2),
        "peak_mb": round(usage.ru_maxrss / 1024),
        **{key: final(recorded[key]) for key in RESULTS[lesson] | CONSTANTS.get(lesson, {})},
        **{key: recorded[key] for key in ("env_steps", "memory_bytes") if key in recorded},
    }


def run_seeds(lesson: str, flags: str = "", workers: int = 1, env: dict[str, str] | None = None) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(run_once, lesson, f"{flags} --seed {seed}", Path(folder) / str(seed), env) for seed in SEEDS
        ]
        return [job.result() for job in jobs]


def median_and_range(values: list[float], pattern: str) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{pattern.format(middle)} ({pattern.format(low)} – {pattern.format(high)})"


def results_table(lesson: str, record: dict) -> str:
    """README 的結果表，完全由 results.json 決定。"""
    runs = record["runs"]
    lines = [f"種子 {runs[0]['seed']} 到 {runs[-1]['seed']}，預設設定，{record['machine']}。", ""]
    lines += ["| 量 | 中位數 (最小 – 最大) |", "| --- | --- |"]
    for key, (name, pattern) in RESULTS[lesson].items():
        lines.append(f"| {name} | {median_and_range([run[key] for run in runs], pattern)} |")
    for key, name, pattern in (
        ("total_seconds", "整個行程的秒數，從啟動到結束", "{:.1f}"),
        ("train_seconds", "其中訓練的秒數", "{:.1f}"),
        ("peak_mb", "記憶體最大用量 (MB)", "{:.0f}"),
    ):
        lines.append(f"| {name} | {median_and_range([run[key] for run in runs], pattern)} |")
    for key, (name, pattern) in RESULTS[lesson].items():
        values = [run[key] for run in runs]
        each = "、".join(pattern.format(value) for value in values)
        lines += [
            "",
            f"{name}，{len(values)} 個種子的平均 {pattern.format(statistics.mean(values))}。每個種子：{each}。",
        ]
    return "\n".join(lines) + "\n"


def recorded_runs(lesson: str) -> list[dict]:
    return json.loads((ROOT / lesson / "figures" / "results.json").read_text(encoding="utf-8"))["runs"]


def worst(key: str, values: list[float]) -> float:
    return min(values) if HIGHER_IS_BETTER[key] else max(values)


def lessons_table() -> str:
    """專案 README 最上面的總表，由每一課的 results.json 決定。"""
    lines = ["| 課 | 問題 | 指令 | 目標 | 十個種子：平均 (最差) | 秒 (中位數) |", "|" + " --- |" * 6]
    for lesson in LESSONS:
        title, question, key, target = FRONT_PAGE[lesson]
        (name, pattern), runs = RESULTS[lesson][key], recorded_runs(lesson)
        values, seconds = [run[key] for run in runs], statistics.median(run["total_seconds"] for run in runs)
        reached = f"{pattern.format(statistics.mean(values))} ({pattern.format(worst(key, values))})"
        command = f"`python {script(lesson).relative_to(ROOT)}`"
        cells = f"[{title}]({lesson}/README.md)", question, command, f"{name} {target}", reached, f"{seconds:.1f}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def evolution_table() -> str:
    """專案 README 的演進表：訓練時要記住的位元組，與走了幾步；十個種子的中位數。"""
    columns = {"parameters": "參數", "gradients": "梯度", "moments": "Adam 動量", "data": "資料"}
    lines = [f"| 演算法 | {' | '.join(columns.values())} | 與環境互動的步數 |", "|" + " --- |" * 6]
    for lesson in LESSONS:
        runs = recorded_runs(lesson)
        if "memory_bytes" in runs[0]:
            memory, steps = runs[0]["memory_bytes"], statistics.median(run["env_steps"] for run in runs)
            cells = (f"{memory[key]:,} B" if key in memory else "—" for key in columns)
            title = FRONT_PAGE[lesson][0].partition("：")[2]
            lines.append(f"| [{title}]({lesson}/README.md) | {' | '.join(cells)} | {steps:,.0f} |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    cores = len(os.sched_getaffinity(0))
    return f"{cores} 個 CPU 核心、沒有 GPU，CPython {platform.python_version()}"


def trial_rows(lesson: str) -> list[tuple[str, str]]:
    """README 試驗表每一列的 (說明, 旗標)；旗標寫在第二欄的反引號裡。"""
    table = block((ROOT / lesson / "README.md").read_text(encoding="utf-8"), "trials")
    return re.findall(r"^\| ([^|]+) \| `([^`|]*)` \|", table, re.MULTILINE)


def trials_table(lesson: str, rows: list[tuple[str, str]], record: dict) -> str:
    names = [name for name, _ in RESULTS[lesson].values()]
    header = ["試驗", "旗標", *(column for name in names for column in (f"{name}：平均", "最差的種子"))]
    constants = CONSTANTS.get(lesson, {})
    header += [name for name, _ in constants.values()]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for name, flags in rows:
        cells = []
        for key, (_, pattern) in RESULTS[lesson].items():
            values = [run[key] for run in record["runs"][flags]]
            cells += [pattern.format(statistics.mean(values)), pattern.format(worst(key, values))]
        for key, (_, pattern) in constants.items():
            (value,) = {run[key] for run in record["runs"][flags]}  # 每個隨機種子都一樣
            cells.append(pattern.format(value))
        lines.append(f"| {name} | `{flags}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_json(path: Path, record) -> None:
    path.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def benchmark_results(lesson: str, write: bool) -> None:
    record = {"machine": machine(), "defaults": defaults(lesson), "runs": run_seeds(lesson)}
    table = results_table(lesson, record)
    print(f"{lesson}\n\n{table}")
    if write:
        write_json(ROOT / lesson / "figures" / "results.json", record)
        replace_block(ROOT / lesson / "README.md", "results", table)
        replace_block(ROOT / lesson / "README.md", "config", config_table(lesson))
        with tempfile.TemporaryDirectory() as folder:  # 圖用預設的隨機種子
            run_once(lesson, "", Path(folder))
            copy_figures(lesson, Path(folder))


def copy_figures(lesson: str, out_dir: Path) -> None:
    """README 有用到的圖才收進 figures/。"""
    readme = (ROOT / lesson / "README.md").read_text(encoding="utf-8")
    for figure in [*out_dir.glob("*.png"), *out_dir.glob("*.gif")]:
        if f"figures/{figure.name}" in readme:
            shutil.copy(figure, ROOT / lesson / "figures" / figure.name)


def benchmark_compare(lesson: str, write: bool) -> None:
    default = {"comparison": ("--compare", "comparison", "comparison_table")}
    for name, (flags, key, table) in COMPARISONS.get(lesson, default).items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(script(lesson)), *flags.split(), "--out-dir", folder]
            subprocess.run(command, env=environment(), check=True)
            if write:
                rows = metrics(Path(folder))[key]
                record = {"defaults": defaults(lesson), "rows": rows}
                write_json(ROOT / lesson / "figures" / f"{name}.json", record)
                replace_block(ROOT / lesson / "README.md", name, getattr(load(lesson).extras, table)(rows))
                copy_figures(lesson, Path(folder))


def benchmark_trials(lesson: str, write: bool, again: bool) -> None:
    """每一列試驗跑種子 0 到 9，做完一列存一列。只看結果，不看時間：兩個行程同時跑，編譯過的程式共用。"""
    rows, path = trial_rows(lesson), ROOT / lesson / "figures" / "trials.json"
    record = {"defaults": defaults(lesson), "runs": {}}
    if path.exists() and not again:
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["defaults"] == record["defaults"]:  # 預設值變了，舊的紀錄就不算數
            record["runs"] = {flags: old["runs"][flags] for _, flags in rows if flags in old["runs"]}
    for name, flags in rows:
        if flags not in record["runs"]:
            runs = run_seeds(lesson, flags, workers=2, env=environment())
            keys = ("seed", *RESULTS[lesson], *CONSTANTS.get(lesson, {}))
            record["runs"][flags] = [{key: run[key] for key in keys} for run in runs]
            print(name, flags, [list(run.values()) for run in record["runs"][flags]], flush=True)
            if write:
                write_json(path, record)
    table = trials_table(lesson, rows, record)
    print(table)
    if write:
        write_json(path, record)
        replace_block(ROOT / lesson / "README.md", "trials", table)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lesson", nargs="?", choices=LESSONS, help="哪一課")
    parser.add_argument("--all", action="store_true", help="每一課，不只一課")
    parser.add_argument("--compare", action="store_true", help="更新比較圖與比較表")
    parser.add_argument("--trials", action="store_true", help="更新試驗表")
    parser.add_argument("--write", action="store_true", help="寫進 figures/ 與 README")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    if not arguments.all and arguments.lesson is None:
        make_parser().error("要給一課的資料夾名，或 --all")
    for lesson in LESSONS if arguments.all else [arguments.lesson]:
        if not (arguments.compare or arguments.trials):
            benchmark_results(lesson, arguments.write)
        if arguments.compare:
            benchmark_compare(lesson, arguments.write)
        if arguments.trials:
            benchmark_trials(lesson, arguments.write, again=arguments.all)
    if arguments.write:
        replace_block(ROOT / "README.md", "lessons", lessons_table())
        replace_block(ROOT / "README.md", "evolution", evolution_table())


if __name__ == "__main__":
    main()
