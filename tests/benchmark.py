"""把一課當成使用者那樣整個執行，量時間、記憶體與結果；README 裡的每個數字都從這裡來。

python tests/benchmark.py 3_Pendulum                   種子 1000 到 1009，印出來
python tests/benchmark.py 3_Pendulum --write           並寫進 figures/results.json 與 README 的結果表
python tests/benchmark.py 3_Pendulum --compare --write    跑 --compare，更新比較圖與比較表
python tests/benchmark.py 3_Pendulum --trials --write     跑 README 試驗表，更新表中的數字
python tests/benchmark.py --all --write                每一課的結果，與專案 README 的總表
python tests/benchmark.py --all --compare --trials --write    每一課的比較與試驗

開始前先印出大概要多久。做完一項存一項；中斷之後再打同一個指令，同樣的程式與預設值下已經有紀錄的不會重跑
(要重跑就刪掉 figures/ 裡的 .json)；只改了畫圖或表格的函式，就由紀錄重畫。
--compare 做完一次訓練存一次，存在 figures/comparison.partial.json，全部做完就刪掉。
"""

import argparse
import ast
import concurrent.futures
import hashlib
import importlib.util
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

import tyro
from lessons import (
    COMPARISONS,
    CONSTANTS,
    FRONT_PAGE,
    HIGHER_IS_BETTER,
    LESSONS,
    RESULTS,
    ROOT,
    TASK_FLAGS,
    block,
    config_table,
    defaults,
    environment,
    load,
    metrics,
    replace_block,
    script,
)

lesson_extras = load(LESSONS[0]).extras.lesson_extras
SEEDS, show_mean, show_difference = lesson_extras.SEEDS, lesson_extras.show_mean, lesson_extras.show_difference


# *_extras.py 裡只排表格、畫圖、看它玩、拒絕錯的旗標的函式：紀錄裡的數字不經過它們，改了只要重畫，不必重跑。
ONLY_SHOWS = re.compile(
    r"draw.*|show_.*|.*_table|interval|figure|save_gif|describe"
    r"|check|check_.*|refuse_.*|play|watch|end_at_once|has_display|load_weights"
)


def code_digest(lesson: str, extras: bool = False) -> str:
    """這一課程式的指紋，註解與說明文字不算；extras 決定要不要連 *_extras.py 裡量東西的一起算。"""
    digest = hashlib.sha256()
    for path in sorted((ROOT / lesson).glob("*.py")):
        is_extras = path.stem.endswith("_extras")
        if path.name in ("lesson.py", "hosts.py") or (is_extras and not extras):  # 命令列、幾台主機：和數字無關
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]  # 用到的才算
        if is_extras:
            tree.body = [node for node in tree.body if not only_shows(node)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def only_shows(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and bool(ONLY_SHOWS.fullmatch(node.name))


def stamp(lesson: str, extras: bool = False) -> dict:
    """一份紀錄是在哪樣的程式與預設值上做的。"""
    return {"code": code_digest(lesson, extras), "defaults": defaults(lesson)}


def recorded(lesson: str, name: str, extras: bool = False) -> dict:
    """figures/name.json；沒有，或程式與預設值變了，就從頭開始。"""
    path = ROOT / lesson / "figures" / f"{name}.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    fresh = stamp(lesson, extras)
    return record if {key: record.get(key) for key in fresh} == fresh else fresh


def announce(what: str, seconds: float) -> None:
    print(f"{what}：大概還要 {seconds / 60:.0f} 分鐘", flush=True)


def results_seconds(lesson: str) -> float:
    """還沒有記錄的結果，大概要幾秒；下面兩個一樣，各是比較與試驗的。"""
    return (len(SEEDS) - len(recorded(lesson, "results").get("runs", []))) * recorded_seconds(lesson)


def comparison_seconds(lesson: str, name: str) -> float:
    """照上一次花的時間；沒有就當作十分鐘。"""
    path = ROOT / lesson / "figures" / f"{name}.json"
    last = json.loads(path.read_text(encoding="utf-8")).get("seconds", 600) if path.exists() else 600
    return 0 if "rows" in recorded(lesson, name, extras=True) else last


def trials_seconds(lesson: str) -> float:
    known = recorded(lesson, "trials").get("runs", {})
    return sum(flags not in known for _, flags in trial_rows(lesson)) * len(SEEDS) * recorded_seconds(lesson) / 2


def recorded_seconds(lesson: str) -> float:
    """上一次紀錄裡，跑一次的秒數 (中位數)；沒有紀錄就當作 30 秒。"""
    path = ROOT / lesson / "figures" / "results.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else [{"total_seconds": 30}]
    return statistics.median(run["total_seconds"] for run in runs)


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


def run_seeds(lesson: str, flags: str) -> list[dict]:
    """兩個行程一起跑；編譯過的程式在它們之間共用。"""
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(2) as pool:
        env = environment()
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
    seeds = f"種子 {runs[0]['seed']} 到 {runs[-1]['seed']} (調整設定只用 0 到 9)"
    lines = [f"{seeds}，預設設定，{record['machine']}。", ""]
    lines += ["| 量 | 平均 [95 % 信賴區間] | 最差的種子 |", "| --- | --- | --- |"]
    for key, (name, pattern) in RESULTS[lesson].items():
        values = [run[key] for run in runs]
        lines.append(f"| {name} | {show_mean(values, pattern)} | {pattern.format(worst(key, values))} |")
    lines += ["", "| 花費 | 中位數 (最小 – 最大) |", "| --- | --- |"]
    for key, name, pattern in (
        ("total_seconds", "整個行程的秒數，從啟動到結束", "{:.1f}"),
        ("train_seconds", "其中訓練的秒數", "{:.1f}"),
        ("peak_mb", "記憶體最大用量 (MB)", "{:.0f}"),
    ):
        lines.append(f"| {name} | {median_and_range([run[key] for run in runs], pattern)} |")
    for key, (name, pattern) in RESULTS[lesson].items():
        lines += ["", f"{name}，每個種子：{'、'.join(pattern.format(run[key]) for run in runs)}。"]
    return "\n".join(lines) + "\n"


def recorded_runs(lesson: str) -> list[dict]:
    return json.loads((ROOT / lesson / "figures" / "results.json").read_text(encoding="utf-8"))["runs"]


def worst(key: str, values: list[float]) -> float:
    return min(values) if HIGHER_IS_BETTER[key] else max(values)


def lessons_table() -> str:
    """專案 README 最上面的總表，由每一課的 results.json 決定。"""
    lines = ["| 課 | 問題 | 指令 | 目標 | 平均 [95 % 信賴區間] | 最差的種子 | 秒 (中位數) |", "|" + " --- |" * 7]
    for lesson in LESSONS:
        title, question, key, target = FRONT_PAGE[lesson]
        (name, pattern), runs = RESULTS[lesson][key], recorded_runs(lesson)
        values, seconds = [run[key] for run in runs], statistics.median(run["total_seconds"] for run in runs)
        reached, lowest = show_mean(values, pattern), pattern.format(worst(key, values))
        command = f"`python {script(lesson).relative_to(ROOT)}`"
        cells = (
            f"[{title}]({lesson}/README.md)",
            question,
            command,
            f"{name} {target}",
            reached,
            lowest,
            f"{seconds:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def evolution_table() -> str:
    """專案 README 的演進表：訓練時要記住的位元組，與走了幾步；十個種子的中位數。"""
    columns = {"parameters": "參數", "gradients": "梯度", "moments": "Adam 動差", "data": "資料"}
    lines = [f"| 演算法 | {' | '.join(columns.values())} | 與環境互動的步數 |", "|" + " --- |" * 6]
    for lesson in LESSONS:
        runs = recorded_runs(lesson)
        if "memory_bytes" in runs[0]:
            memory, steps = runs[0]["memory_bytes"], statistics.median(run["env_steps"] for run in runs)
            cells = (f"{memory[key]:,} B" if key in memory else "—" for key in columns)
            title = FRONT_PAGE[lesson][0].partition("：")[2]
            lines.append(f"| [{title}]({lesson}/README.md) | {' | '.join(cells)} | {steps:,.0f} |")
    return "\n".join(lines) + "\n"


COMPARE = {"comparison": ("--compare", "comparison", "comparison_table")}  # 沒有寫在 COMPARISONS 裡的課


def machine() -> str:
    cores = len(os.sched_getaffinity(0))
    return f"{cores} 個 CPU 核心、沒有 GPU，CPython {platform.python_version()}"


def trial_rows(lesson: str) -> list[tuple[str, str]]:
    """README 試驗表每一列的 (說明, 旗標)；旗標寫在第二欄的反引號裡。"""
    table = block((ROOT / lesson / "README.md").read_text(encoding="utf-8"), "trials")
    return re.findall(r"^\| ([^|]+) \| `([^`|]*)` \|", table, re.MULTILINE)


def reference_of(flags: str, earlier: list[str], lesson: str) -> str | None:
    """一列試驗和哪一列比：前面的列裡，旗標都包含在這一列的那些，取最長的；沒有就是第一列。

    換了題目 (TASK_FLAGS) 的第一列沒有對象可比。
    """
    own = set(re.findall(r"--\S+(?: [^-]\S*)?", flags))
    contained = [row for row in earlier if set(re.findall(r"--\S+(?: [^-]\S*)?", row)) < own]
    reference = max(contained, key=len, default=earlier[0] if earlier else None)
    task = [[flag for flag in TASK_FLAGS.get(lesson, ()) if flag in row.split()] for row in (flags, reference or "")]
    return reference if task[0] == task[1] else None


def trials_table(lesson: str, rows: list[tuple[str, str]], record: dict) -> str:
    """每一列的平均與最差的種子，以及和參考的那一列同種子相減的差；判斷只說區間撐得起的。"""
    header, constants = ["試驗", "旗標"], CONSTANTS.get(lesson, {})
    for name, _ in RESULTS[lesson].values():
        header += [f"{name}：平均 [95 % 信賴區間]", "最差的種子", "差 [95 % 信賴區間]"]
    lines, header = [], header + [name for name, _ in constants.values()]
    for i, (name, flags) in enumerate(rows):
        cells, runs = [name, f"`{flags}`"], record["runs"][flags]
        reference = record["runs"].get(reference_of(flags, [row for _, row in rows[:i]], lesson))
        for key, (_, pattern) in RESULTS[lesson].items():
            values = [run[key] for run in runs]
            cells += [show_mean(values, pattern), pattern.format(worst(key, values))]
            compared = [run[key] for run in reference or ()]
            signed = pattern.replace("{:", "{:+")
            cells.append(show_difference(values, compared, signed, HIGHER_IS_BETTER[key]) if reference else "—")
        for key, (_, pattern) in constants.items():
            (value,) = {run[key] for run in runs}  # 每個隨機種子都一樣
            cells.append(pattern.format(value))
        lines.append(cells)
    return lesson_extras.markdown_table(header, lines)


def write_json(path: Path, record) -> None:
    path.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def benchmark_results(lesson: str, write: bool) -> None:
    record = recorded(lesson, "results")
    runs = record.setdefault("runs", [])
    announce(f"{lesson} 的結果", results_seconds(lesson))
    record["machine"] = machine()
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS[len(runs) :]:
            runs.append(run_once(lesson, f"--seed {seed}", Path(folder) / str(seed)))
            if write:
                write_json(ROOT / lesson / "figures" / "results.json", record)
    table = results_table(lesson, record)
    print(f"{lesson}\n\n{table}")
    if write:
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


def run_and_remember(lesson: str, partial: str, *flags: str) -> None:
    """在這個行程裡跑一課的 main；--compare 的每一次訓練，做完就存進 partial，已經存著的不再做。"""
    module, path = load(lesson), Path(partial)
    original = lesson_extras.compare

    def compare(run, config, variants: dict, measure, *rest) -> None:
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        fresh = json.loads(json.dumps(stamp(lesson, extras=True)))
        known = record["measured"] if {key: record.get(key) for key in fresh} == fresh else {}

        def remembered(name: str, variant) -> dict:
            settings = json.dumps({"name": name} | vars(variant) | {"out_dir": ""}, default=str)
            if settings not in known:
                measured = measure(name, variant)
                if run.stop.is_set():
                    return measured
                known[settings] = measured
                write_json(path, fresh | {"measured": known})
            return known[settings]

        original(run, config, variants, remembered, *rest)

    lesson_extras.compare = compare  # 每個資料夾的都相同，所以載入的是同一個
    sys.argv = [str(script(lesson)), *flags]
    module.RUN(module.main)


def has_compiler(flags: str) -> bool:
    """--compile-for 要的套件在不在 (jax[cuda13]、jax[tpu])。"""
    modules = {"--compile-for h100": "jax_cuda13_plugin", "--compile-for v5p": "libtpu"}
    return all(importlib.util.find_spec(name) for flag, name in modules.items() if flag in flags)


def benchmark_compare(lesson: str, write: bool) -> None:
    for name, (flags, key, table) in COMPARISONS.get(lesson, COMPARE).items():
        record = recorded(lesson, name, extras=True)
        if "rows" not in record:
            path = ROOT / lesson / "figures" / f"{name}.json"
            if not has_compiler(flags):
                print(f"{lesson} 的 {name}：這裡沒有那種晶片的編譯器，跳過")
                continue
            announce(f"{lesson} 的 {name}", comparison_seconds(lesson, name))
            start = time.perf_counter()
            partial = path.with_suffix(".partial.json")
            with tempfile.TemporaryDirectory() as folder:
                code = "import sys, benchmark; benchmark.run_and_remember(*sys.argv[1:])"
                command = [sys.executable, "-c", code, lesson, str(partial), *flags.split(), "--out-dir", folder]
                subprocess.run(command, cwd=ROOT / "tests", env=environment(), check=True, stdout=subprocess.DEVNULL)
                record |= {"seconds": round(time.perf_counter() - start), "rows": metrics(Path(folder))[key]}
                if write:
                    write_json(path, record)
                    if name != "samples":  # 只跑一種策略，它的圖不是 README 的
                        copy_figures(lesson, Path(folder))
            partial.unlink(missing_ok=True)
        extras = load(lesson).extras
        text = getattr(extras, table)(record["rows"])
        print(text)
        if write:
            replace_block(ROOT / lesson / "README.md", name, text)
            if name == "comparison" and hasattr(extras, "draw_comparison"):  # 圖和表一樣，由紀錄重畫
                with tempfile.TemporaryDirectory() as folder:
                    extras.draw_comparison(record["rows"], Path(folder))
                    copy_figures(lesson, Path(folder))


def default_runs(lesson: str, flags: str) -> list[dict]:
    """旗標就是預設值的那一列，和結果是同樣的十次執行；不是，或還沒有記錄，就是空的。"""
    config_class = load(lesson).Config
    runs = recorded(lesson, "results").get("runs", [])
    same = tyro.cli(config_class, args=flags.split()) == config_class()
    return runs if same and len(runs) == len(SEEDS) else []


def benchmark_trials(lesson: str, write: bool) -> None:
    """每一列試驗跑 SEEDS，做完一列存一列。只看結果，不看時間：兩個行程同時跑，編譯過的程式共用。"""
    rows, path = trial_rows(lesson), ROOT / lesson / "figures" / "trials.json"
    record = recorded(lesson, "trials")
    known = record.get("runs", {})
    record["runs"] = {flags: known[flags] for _, flags in rows if flags in known}
    missing = [(name, flags) for name, flags in rows if flags not in record["runs"]]
    announce(f"{lesson} 的試驗", trials_seconds(lesson))
    for name, flags in missing:
        runs = default_runs(lesson, flags) or run_seeds(lesson, flags)
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


def seconds_left(lesson: str, arguments: argparse.Namespace) -> float:
    if not (arguments.compare or arguments.trials):
        return results_seconds(lesson)
    comparisons = COMPARISONS.get(lesson, COMPARE) if arguments.compare else ()
    seconds = sum(comparison_seconds(lesson, name) for name in comparisons)
    return seconds + (trials_seconds(lesson) if arguments.trials else 0)


def main() -> None:
    arguments = make_parser().parse_args()
    if not arguments.all and arguments.lesson is None:
        make_parser().error("要給一課的資料夾名，或 --all")
    lessons = LESSONS if arguments.all else [arguments.lesson]
    announce("全部", sum(seconds_left(lesson, arguments) for lesson in lessons))
    for lesson in lessons:
        if not (arguments.compare or arguments.trials):
            benchmark_results(lesson, arguments.write)
        if arguments.compare:
            benchmark_compare(lesson, arguments.write)
        if arguments.trials:
            benchmark_trials(lesson, arguments.write)
    if arguments.write:
        replace_block(ROOT / "README.md", "lessons", lessons_table())
        replace_block(ROOT / "README.md", "evolution", evolution_table())


if __name__ == "__main__":
    main()
