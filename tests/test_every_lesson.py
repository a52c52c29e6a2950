"""每一課都要成立的事：像使用者一樣，在子行程裡、從別的工作目錄執行；使用者的行程沒有差別的，在同一個行程裡做。"""

import ast
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
import warnings

import lessons
import pytest
from lessons import EVERY_FLAG, LESSONS, LONG, ROOT, WRONG, load, metrics, run, script

SHARED = ("lesson.py", "lesson_extras.py")
MOST_LINES = {"1_Q_Learning": 300}  # 其餘的 400

pytestmark = pytest.mark.parametrize("lesson", LESSONS)


def test_help_explains_every_flag(lesson, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = call(lesson, "--help")
    assert status == 0
    text = "".join(out.split())
    for name, _, doc in lessons.config_fields(lesson):
        assert "--" + name.replace("_", "-") in text
        assert "".join(doc.split())[:8] in text
    assert not list(tmp_path.iterdir())


def test_short_runs_use_every_flag(lesson):
    used = {word for flags in EVERY_FLAG[lesson] for word in flags.split() if word.startswith("--")}
    names = {word.removeprefix("--").removeprefix("no-").replace("-", "_") for word in used}
    own_tests = {"base", "compare", "watch", "out_dir", "coordinator", "num_processes", "process_id"}
    fields = {name for name, _, _ in lessons.config_fields(lesson)}
    assert names | (own_tests & fields) == fields


def check_outputs(status: int, out: str, err: str, out_dir) -> None:
    assert status == 0, err
    assert out.splitlines()[-2].startswith(("達標：", "未達標："))
    assert out.splitlines()[-1] == f"結果存在 {out_dir}"
    assert err == ""  # 沒有警告；不是終端機，所以也沒有進度列
    assert metrics(out_dir)["seconds"]["total"] > 0


def test_one_seed_gives_one_result_also_when_the_folder_stands_alone(lesson, tmp_path):
    """第一組旗標跑兩次：一次在專案裡，一次在複製走的資料夾裡；結果相同。"""
    alone = tmp_path / "只有 這一課" / lesson
    shutil.copytree(ROOT / lesson, alone, ignore=shutil.ignore_patterns("outputs", "__pycache__", ".jax_cache"))
    if lesson == "5_Sharding_Demo":  # 它訓練的文字是全部的 README
        for readme in lessons.READMES:
            copy = alone.parent / readme.relative_to(ROOT)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(readme, copy)
    recorded = []
    for path in (script(lesson), alone / script(lesson).name):
        out_dir = tmp_path / f"第 {len(recorded)} 次"  # 路徑有空白與中文字也要能用
        result = run(lesson, [*EVERY_FLAG[lesson][0].split(), "--out-dir", str(out_dir)], tmp_path, path=path)
        check_outputs(result.returncode, result.stdout, result.stderr, out_dir)
        recorded.append(metrics(out_dir))
    for record in recorded:
        del record["seconds"], record["config"]["out_dir"], record["lesson"], record["versions"], record["device"]
        for strategy in record.get("strategies", {}).values():  # 第 5 課的時間寫在每一種策略裡
            del strategy["seconds_per_step"]
    assert recorded[0] == recorded[1]


def test_every_flag_runs(lesson, call, tmp_path):
    """其餘的旗標。在同一個行程裡，警告當作錯誤；第 5 課的帳要 64 個假裝置，自己一個行程。"""
    for i, flags in enumerate(EVERY_FLAG[lesson][1:]):
        out_dir = tmp_path / f"第 {i} 次"
        flags = [*flags.split(), "--out-dir", str(out_dir)]
        if lesson == "5_Sharding_Demo":
            result = run(lesson, flags, tmp_path)
            check_outputs(result.returncode, result.stdout, result.stderr, out_dir)
            continue
        with warnings.catch_warnings(action="error"):
            check_outputs(*call(lesson, flags), out_dir)


def test_wrong_values_are_refused_before_anything_is_written(lesson, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags in WRONG[lesson]:
        status, out, err = call(lesson, f"{flags} --out-dir out")
        assert status == 2, flags
        assert out == "", flags
        assert "；" in err or "--help" in err, err  # 我們的句子，或 tyro 的 (附上最像的旗標與 --help)
        assert "Traceback" not in err, err
    assert not list(tmp_path.iterdir())


def test_an_unwritable_out_dir_is_refused(lesson, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    refusal = "錯誤：--out-dir a_file/out 寫不進去；要是可以寫入的資料夾\n"
    assert call(lesson, "--out-dir a_file/out") == (2, "", refusal)
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


def test_ctrl_c_keeps_what_was_learnt(lesson, tmp_path):
    """在終端機裡跑很久的訓練，看到進度之後按一次 Ctrl-C。"""
    terminal, child_side = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))  # 寬度是 0 的終端機，tqdm 什麼都不畫
    process = subprocess.Popen(
        [sys.executable, str(script(lesson)), *LONG[lesson].split(), "--out-dir", "out"], cwd=tmp_path,
        env=lessons.short_environment(), stdout=subprocess.PIPE, stderr=child_side, text=True, encoding="utf-8",
    )  # fmt: skip
    os.close(child_side)
    seen, deadline = b"", time.monotonic() + 120
    learning = "平均獎勵" if lesson == "6_GRPO_LLM" else "平均"  # 第 6 課的預訓練也有平均損失，那時還沒有開始學
    while learning.encode() not in seen:  # 進度列上第一個讀者在乎的數字
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    seen += os.read(terminal, 4096)
    os.close(terminal)
    assert process.returncode == 130, output
    assert "再按一次 Ctrl-C" in seen.decode(errors="replace")
    assert output.splitlines()[-1].startswith("已中斷：")
    assert output.splitlines()[-1].endswith("目前的結果存在 out")
    assert metrics(tmp_path / "out")["lesson"] == lesson
    assert (tmp_path / "out" / "learning_curve.png").stat().st_size > 0


def test_anatomy(lesson):
    module = load(lesson)
    assert module.__doc__.startswith(f"第 {lesson[0]} 課：")
    assert [name for name, _, _ in lessons.config_fields(lesson)][-1] == "out_dir"
    assert module.Config().seed == 42
    for name in ("train", "evaluate", "main"):
        assert callable(getattr(module, name))


def test_the_story_is_short_and_the_shared_files_are_equal(lesson):
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / lesson).glob("*.py")}
    assert lines[script(lesson).name] <= MOST_LINES.get(lesson, 400)
    assert lines["lesson.py"] <= 130
    shared = [(name, LESSONS[0]) for name in SHARED]
    shared += [(name, "5_Sharding_Demo") for name in ("hosts.py", "collectives.py") if lesson == "6_GRPO_LLM"]
    shared += [("snapshot.py", "2_Cart_Pole_DQN")] if lesson == "3_Pendulum" else []
    for name, owner in shared:
        first, own = ROOT / owner / name, ROOT / lesson / name
        assert own.read_bytes() == first.read_bytes(), f"cp {first.relative_to(ROOT)} {own.relative_to(ROOT)}"


def test_imports_go_one_way(lesson):
    """腳本匯入它旁邊的檔案，旁邊的不匯入腳本；也沒有人用 pickle。"""
    for path in (ROOT / lesson).glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & {"pickle", "cloudpickle", "joblib", "shelve", "dill", script(lesson).stem}, path
        keywords = [keyword for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords]
        assert all(keyword.value.value is False for keyword in keywords if keyword.arg == "allow_pickle")
