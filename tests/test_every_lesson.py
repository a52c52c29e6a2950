"""每一課都要成立的事：像使用者一樣，在子行程裡、從別的工作目錄執行。"""

import ast
import functools
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

import lessons
import pytest
from lessons import EVERY_FLAG, LESSONS, SHORT, WRONG, load, metrics, run, script

CORE_HELPERS = {
    "fail", "require", "require_bounds", "parse_config", "prepare_out_dir", "stop_on_ctrl_c",
    "save_metrics", "plot_style", "save_figure", "finish",
}  # fmt: skip
SHARED_HELPERS = CORE_HELPERS | {
    "has_display", "save_gif", "save_weights", "load_weights", "watch", "draw_curves", "array_bytes",
    "clipped_objective",
}  # fmt: skip

pytestmark = pytest.mark.parametrize("lesson", LESSONS)


@functools.cache
def functions(lesson: str) -> dict[str, str]:
    text = script(lesson).read_text(encoding="utf-8")
    nodes = ast.parse(text).body
    return {node.name: ast.get_source_segment(text, node) for node in nodes if isinstance(node, ast.FunctionDef)}


def test_help_explains_every_flag(lesson, tmp_path):
    result = run(lesson, "--help", tmp_path)
    assert result.returncode == 0
    text = "".join(result.stdout.split())
    for name, _, doc in lessons.config_fields(lesson):
        assert "--" + name.replace("_", "-") in text
        assert "".join(doc.split())[:8] in text
    assert not list(tmp_path.iterdir())


def test_short_runs_use_every_flag(lesson):
    used = {word for flags in EVERY_FLAG[lesson] for word in flags.split() if word.startswith("--")}
    names = {word.removeprefix("--").removeprefix("no-").replace("-", "_") for word in used}
    own_tests = {"compare", "watch", "out_dir", "coordinator", "num_processes", "process_id"}
    fields = {name for name, _, _ in lessons.config_fields(lesson)}
    assert names | (own_tests & fields) == fields


def test_every_flag_runs(lesson, tmp_path):
    for i, flags in enumerate(EVERY_FLAG[lesson]):
        out_dir = tmp_path / f"第 {i} 次"  # 路徑有空白與中文字也要能用
        result = run(lesson, [*flags.split(), "--out-dir", str(out_dir)], tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-2].startswith(("達標：", "未達標："))
        assert result.stdout.splitlines()[-1] == f"結果存在 {out_dir}"
        assert metrics(out_dir)["seconds"]["total"] > 0


def assert_refused(status: int, stdout: str, stderr: str, flags: str) -> None:
    assert status == 2, flags
    assert stdout == "", flags
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("錯誤："), stderr
    assert "；" in stderr, stderr


def test_wrong_values_are_refused_in_one_line(lesson, tmp_path, monkeypatch, capsys):
    """在同一個行程裡呼叫 main，一種錯一次。"""
    monkeypatch.chdir(tmp_path)
    for flags in WRONG[lesson]:
        monkeypatch.setattr(sys, "argv", [script(lesson).name, *flags.split(), "--out-dir", "out"])
        with pytest.raises(SystemExit) as stopped:
            load(lesson).main()
        assert_refused(stopped.value.code, *capsys.readouterr(), flags)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_out_dir_is_refused_as_a_user_sees_it(lesson, tmp_path):
    (tmp_path / "a_file").touch()
    result = run(lesson, "--out-dir a_file/out", tmp_path)
    assert_refused(result.returncode, result.stdout, result.stderr, "--out-dir a_file/out")
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


def test_ctrl_c_keeps_what_was_learnt(lesson, tmp_path):
    """在終端機裡跑預設設定，看到進度之後按一次 Ctrl-C。"""
    terminal, child_side = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))  # 寬度是 0 的終端機，tqdm 什麼都不畫
    command = [sys.executable, str(script(lesson)), "--out-dir", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=lessons.environment(), stdout=subprocess.PIPE, stderr=child_side, encoding="utf-8"
    )
    os.close(child_side)
    seen, deadline = b"", time.monotonic() + 120
    while "平均".encode() not in seen:  # 進度列上第一個讀者在乎的數字
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    os.close(terminal)
    assert process.returncode == 130, output
    assert output.splitlines()[-1].startswith("已中斷：")
    assert str(tmp_path / "out") in output.splitlines()[-1]
    assert metrics(tmp_path / "out")["lesson"] == lesson
    assert (tmp_path / "out" / "learning_curve.png").stat().st_size > 0


def test_one_seed_gives_one_result(lesson, tmp_path):
    recorded = []
    for name in ("a", "b"):
        result = run(lesson, f"{SHORT[lesson]} --seed 3 --out-dir {name}", tmp_path)
        assert result.returncode == 0, result.stderr
        recorded.append(metrics(tmp_path / name))
        del recorded[-1]["seconds"], recorded[-1]["config"]["out_dir"]
        for strategy in recorded[-1].get("strategies", {}).values():  # 第 5 課的時間寫在每一種策略裡
            del strategy["seconds_per_step"]
    assert recorded[0] == recorded[1]


def test_helpers_are_the_same_everywhere(lesson):
    own, first = functions(lesson), functions(LESSONS[0])
    assert own.keys() >= CORE_HELPERS
    for name in SHARED_HELPERS & own.keys():
        for other in LESSONS:
            assert own[name] == functions(other).get(name, own[name]), f"{name} differs: {lesson}, {other}"
    assert first.keys() >= CORE_HELPERS


def test_anatomy(lesson):
    module = load(lesson)
    assert module.__doc__.startswith(f"第 {lesson[0]} 課：")
    assert [name for name, _, _ in lessons.config_fields(lesson)][-1] == "out_dir"
    assert module.Config().seed == 42
    for name in ("train", "evaluate", "main", "check"):
        assert callable(getattr(module, name))


def test_no_pickle(lesson):
    tree = ast.parse(script(lesson).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"pickle", "cloudpickle", "joblib", "shelve", "dill"}
    keywords = [keyword for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords]
    assert all(keyword.value.value is False for keyword in keywords if keyword.arg == "allow_pickle")
