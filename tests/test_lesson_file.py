"""lesson.py 與 lesson_extras.py：每一課都相同，所以在最快的第 1 課上試 (要 JAX 的，在第 2 課)。"""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import lessons
import nbclient
import nbformat
import numpy as np
import pytest
from flax import nnx
from lessons import SHORT, load, metrics, run, script
from PIL import Image

LESSON = "1_Q_Learning"
JAX_LESSON = "2_Cart_Pole_DQN"
lesson_extras = load(LESSON).extras.lesson_extras
lesson = load(LESSON).lesson


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def leave_nothing_running():
    yield
    while STARTED:
        STARTED.pop().kill()


def start(name: str, flags: str, cwd, environment: dict | None = None, **options) -> subprocess.Popen:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    command = [sys.executable, str(script(name)), *flags.split()]
    STARTED.append(subprocess.Popen(command, cwd=cwd, env=lessons.short_environment() | (environment or {}), **options))
    return STARTED[-1]


def open_terminal() -> tuple[int, int]:
    """虛擬終端機的兩端；寬度是 0 的終端機，tqdm 什麼都不畫。"""
    terminal, child_side = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    return terminal, child_side


def on_a_terminal(name: str, flags: str, cwd, environment: dict | None = None) -> tuple[int, str]:
    """整個行程都在終端機裡；回傳結束狀態與看到的字。"""
    terminal, child_side = open_terminal()
    process = start(name, flags, cwd, environment, stdin=child_side, stdout=child_side, stderr=child_side)
    os.close(child_side)
    seen = b""
    while True:
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # 另一邊關了
            break
    os.close(terminal)
    return process.wait(timeout=60), seen.decode(errors="replace")


# 命令列


@pytest.mark.parametrize("environment", [{"TERM": "xterm-256color"}, {"TERM": "dumb"}, {"PYTHONIOENCODING": "big5"}])
def test_the_wrong_flag_is_named_on_every_terminal(environment, tmp_path):
    status, seen = on_a_terminal(LESSON, "--episods 5", tmp_path, {"PYTHONUTF8": "0", "COLUMNS": "100"} | environment)
    assert status == 2
    assert "--episods" in seen
    assert "--episodes" in seen  # 最像的旗標
    assert "Traceback" not in seen
    assert not list(tmp_path.iterdir())


def test_a_terminal_without_chinese_does_not_stop_a_lesson(tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for flags, words in (("--help", "--out-dir"), (f"{SHORT[LESSON]} --out-dir out", "out")):
        process = start(LESSON, flags, tmp_path, ascii_only)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert words in out
    process = start(LESSON, "--alpha 2", tmp_path, ascii_only)
    assert "--alpha" in process.communicate(timeout=60)[1]
    assert process.returncode == 2


def test_bounds_are_closed_and_nan_is_outside():
    config_class = load(LESSON).Config
    assert config_class(gamma=0.0).gamma == 0.0
    assert config_class(gamma=1.0).gamma == 1.0
    for value in (-1e-9, 1.0000001, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^--gamma 是 .*；要在 0 與 1 之間$"):
            config_class(gamma=value)


@pytest.mark.parametrize(
    ("prepare", "out_dir"),
    [("true", "x" * 300), ("true", f"{'x' * 300}/out"), ("mkdir gone; cd gone; rmdir ../gone", "out")],
)
def test_an_out_dir_that_cannot_exist_is_refused_before_any_work(prepare, out_dir, tmp_path):
    """名字長過檔案系統的上限；工作目錄在執行之前被刪了。"""
    command = f"{prepare}; exec {sys.executable} {script(LESSON)} --out-dir {out_dir}"
    result = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=lessons.environment(), capture_output=True, encoding="utf-8"
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"錯誤：--out-dir {out_dir} 寫不進去；要是可以寫入的資料夾\n"
    assert not list(tmp_path.iterdir())


def test_a_folder_where_metrics_json_belongs_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "metrics.json").mkdir()
    monkeypatch.setattr(sys, "argv", ["x", "--out-dir", str(tmp_path)])
    with pytest.raises(lesson.LessonError, match="寫不進去；要是可以寫入的資料夾") as refused:
        lesson.parse(load(LESSON).Config, "x")
    assert refused.value.args[1] == 2


@pytest.mark.parametrize("target", ["out", "nowhere"])
def test_an_out_dir_that_is_a_broken_link_is_refused_before_any_work(target, tmp_path):
    """連到自己；連到不存在的地方。"""
    (tmp_path / "out").symlink_to(target)
    result = run(LESSON, "--out-dir out", tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "錯誤：--out-dir out 寫不進去；要是可以寫入的資料夾\n"


@pytest.mark.skipif(sys.platform != "linux", reason="只有 Linux 的檔名可以不是 UTF-8")
def test_an_out_dir_whose_name_is_not_utf8_works(tmp_path):
    out_dir = os.fsencode(tmp_path) + b"/\xff"
    command = [sys.executable, script(LESSON), *SHORT[LESSON].split(), "--out-dir", out_dir]
    assert subprocess.run(command, env=lessons.short_environment(), stdout=subprocess.DEVNULL).returncode == 0
    assert metrics(Path(os.fsdecode(out_dir)))["config"]["out_dir"] == os.fsdecode(out_dir)


# 輸出：關掉的、被拿走的、沒有空間的


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "| head -n 1"])
def test_closed_outputs_do_not_stop_a_lesson(closed, tmp_path):
    command = f"exec {sys.executable} {script(LESSON)} {SHORT[LESSON]} --out-dir out {closed}"
    result = subprocess.run(["bash", "-c", f"{command}"], cwd=tmp_path, env=lessons.environment(), capture_output=True)
    assert result.returncode == 0, result.stderr
    assert b"Traceback" not in result.stderr
    assert metrics(tmp_path / "out")["episodes"] == 300
    assert (tmp_path / "out" / "learning_curve.png").stat().st_size > 0


def test_ctrl_c_ends_with_130_also_when_nobody_reads_the_output(tmp_path):
    """`python … | tee log`：Ctrl-C 也結束了 tee。"""
    terminal, child_side = open_terminal()
    process = start(LESSON, "--episodes 1000000 --out-dir out", tmp_path, stderr=child_side)
    os.close(child_side)
    process.stdout.close()
    wait_for("平均", terminal)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    os.close(terminal)
    assert metrics(tmp_path / "out")["episodes"] > 0


def test_results_that_are_not_finite_are_refused(tmp_path):
    """最後一次更新才發散：metrics.json 不會有 NaN，也不會是半個檔案。"""
    module = load(LESSON)
    with pytest.raises(lesson.LessonError) as stopped:
        module.RUN.save_metrics(module.Config(out_dir=tmp_path), 1.0, losses=[1.0, float("nan")])
    assert stopped.value.args == ("結果不是有限的數；把學習率調小再試", 1)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_do_not_replace_good_ones(tmp_path):
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    lesson_extras.save_weights(tmp_path / "weights.npz", module)
    before = (tmp_path / "weights.npz").read_bytes()
    module.kernel[...] = module.kernel[...].at[1, 2].set(np.inf)
    with pytest.raises(lesson.LessonError) as stopped:
        lesson_extras.save_weights(tmp_path / "weights.npz", module)
    assert stopped.value.args == ("權重不是有限的數；把學習率調小再試", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.npz"]
    assert (tmp_path / "weights.npz").read_bytes() == before


def test_no_bars_in_a_log(tmp_path):
    result = run(LESSON, "--compare --episodes 20 --decay-episodes 10 --out-dir out", tmp_path)
    assert result.returncode == 0
    assert result.stderr == ""


def test_a_full_disk_leaves_the_old_files_whole(tmp_path):
    assert run(LESSON, f"{SHORT[LESSON]} --out-dir out", tmp_path).returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    command = f"ulimit -f 2; exec {sys.executable} {script(LESSON)} {SHORT[LESSON]} --seed 1 --out-dir out"
    options = {"env": lessons.short_environment(), "capture_output": True, "encoding": "utf-8"}
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, **options)  # 檔案最大 2 KB
    assert result.returncode == 1
    assert result.stderr.startswith("錯誤：out/metrics.json 寫不進去")
    assert len(result.stderr.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_two_runs_in_one_folder_both_end_well(tmp_path):
    processes = [start(LESSON, f"{SHORT[LESSON]} --seed {seed} --out-dir out", tmp_path) for seed in (1, 2)]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    files = {"q_values.png", "value_spread.png", "learning_curve.png", "metrics.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert metrics(tmp_path / "out")["seed"] in (1, 2)


# Ctrl-C


def interrupted(process: subprocess.Popen) -> str:
    """一定要以 130 結束，沒有 traceback；回傳 stdout。"""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, (out, err)
    assert "Traceback" not in err
    assert "KeyboardInterrupt" not in err
    return out


@pytest.mark.parametrize("library", ["_multiarray_umath", "jaxlib"])
def test_ctrl_c_while_packages_are_imported_ends_with_130_and_writes_nothing(library, tmp_path):
    """等到第一個編譯好的套件 (NumPy、再來是 JAX) 載入，這時後面還有一大串要匯入。"""
    process = start(JAX_LESSON, "--out-dir out", tmp_path)
    while library not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert interrupted(process).startswith("已中斷：還沒有學到東西")
    assert not list(tmp_path.iterdir())


def wait_for(words: str, terminal: int) -> None:
    """等到進度列印出 words。"""
    seen, deadline = b"", time.monotonic() + 60
    while words.encode() not in seen:
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 4096)


@pytest.mark.parametrize(("flags", "words"), [("--episodes 1000000", "訓練"), ("--compare --episodes 1000000", "比較")])
def test_a_second_ctrl_c_ends_at_once_and_keeps_the_old_results(flags, words, tmp_path):
    assert run(LESSON, f"{SHORT[LESSON]} --out-dir out", tmp_path).returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    terminal, child_side = open_terminal()
    process = start(LESSON, f"{flags} --max-steps 1000000 --grid-size 12 --out-dir out", tmp_path, stderr=child_side)
    os.close(child_side)
    wait_for(words, terminal)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    process.communicate(timeout=60)
    os.close(terminal)
    assert process.returncode == 130
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_sigterm_stops_like_ctrl_c(tmp_path):
    terminal, child_side = open_terminal()
    process = start(LESSON, "--episodes 1000000 --out-dir out", tmp_path, stderr=child_side)
    os.close(child_side)
    wait_for("平均", terminal)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    os.close(terminal)
    assert process.returncode == 130
    assert out.splitlines()[-1] == f"已中斷：走完 {metrics(tmp_path / 'out')['episodes']} 個回合，目前的結果存在 out"


def test_an_interrupt_before_anything_is_learnt_writes_nothing(tmp_path, monkeypatch, capsys):
    module = load(LESSON)
    monkeypatch.setattr(module, "RUN", lesson.Run("test", module.__file__))
    module.RUN.stop.set()
    for flags in ("", "--compare"):
        monkeypatch.setattr(sys, "argv", ["Q_Learning.py", *flags.split(), "--out-dir", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as stopped:
            module.main()
        assert stopped.value.code == 130
        assert capsys.readouterr().out == "已中斷：還沒有學到東西，沒有寫任何檔案\n"
    assert not list(tmp_path.iterdir())


def test_a_diverging_run_of_a_comparison_is_named_and_the_others_are_kept(tmp_path, capsys):
    config = load(LESSON).Config(compare=True, out_dir=tmp_path / "out")
    variants = {"small": config, "large": load(LESSON).Config(alpha=1.0)}

    def measure(name: str, variant) -> dict:
        if name == "large" and variant.seed >= diverges:
            raise lesson.LessonError("損失不是有限的數；把學習率調小再試", 1)
        return {"value": float(variant.seed)}

    for diverges, kept in ((0, {"small": 1}), (1001, {"small": 2, "large": 1})):
        drawn = []
        with pytest.raises(lesson.LessonError) as failed:
            lesson_extras.compare(
                lesson.Run("test", str(script(LESSON))), config, variants, measure, str, lambda *_, d=drawn: d.append(1)
            )
        assert failed.value.args == (f"large、隨機種子 {max(diverges, 1000)}：損失不是有限的數；把學習率調小再試", 1)
        assert {name: len(row["value"]) for name, row in metrics(tmp_path / "out")["comparison"].items()} == kept
        assert ("沒有畫圖" in capsys.readouterr().out) == (not drawn) == (len(kept) < 2)


def test_ctrl_c_after_the_training_still_leaves_every_file_and_status_0(tmp_path, monkeypatch, capsys):
    module = load(LESSON)
    run_now = lesson.Run("test", module.__file__)
    evaluate = module.evaluate

    def press(*args):
        run_now.stop.set()
        return evaluate(*args)

    monkeypatch.setattr(module, "RUN", run_now)
    monkeypatch.setattr(module, "evaluate", press)
    monkeypatch.setattr(sys, "argv", ["Q_Learning.py", *SHORT[LESSON].split(), "--out-dir", str(tmp_path / "out")])
    run_now(module.main)
    assert len(list((tmp_path / "out").iterdir())) == 4
    assert capsys.readouterr().out.splitlines()[-1].startswith("結果存在")


# 讀者的環境


def test_the_readers_matplotlib_does_not_matter(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nbackend: no_such_backend\nfont.size: 40\n")
    inline = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    process = start(LESSON, f"{SHORT[LESSON]} --out-dir out", tmp_path, inline)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (tmp_path / "out" / "learning_curve.png").stat().st_size > 0


def test_versions_are_those_of_the_packages_that_the_lesson_imports(tmp_path):
    """第 1 課不需要 JAX：擋住那些套件，照樣跑完。"""
    for package in ("jax", "flax", "optax", "gymnasium", "tensorflow_probability", "tensorflow_datasets"):
        (tmp_path / "blocked" / package).mkdir(parents=True)
        (tmp_path / "blocked" / package / "__init__.py").write_text("raise ImportError('blocked')")
    path = os.pathsep.join([str(tmp_path / "blocked"), lessons.environment()["PYTHONPATH"]])
    process = start(LESSON, f"{SHORT[LESSON]} --out-dir out", tmp_path, {"PYTHONPATH": path})
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert metrics(tmp_path / "out")["versions"].keys() == {"python", "numpy", "matplotlib"}
    assert metrics(tmp_path / "out")["device"] == {"platform": "cpu", "count": 1}


def test_a_platform_that_is_not_here_is_explained(tmp_path):
    process = start(JAX_LESSON, "--out-dir out", tmp_path, {"JAX_PLATFORMS": "cuda"})
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith("錯誤：JAX 在這台機器上用不了 JAX_PLATFORMS=cuda；")
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_debugging_switch_of_jax_keeps_its_traceback(tmp_path):
    flags = "--learning-rate 1e30 --total-steps 1200 --out-dir out"
    process = start(JAX_LESSON, flags, tmp_path, {"JAX_DEBUG_NANS": "1"})
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "FloatingPointError" in err
    assert "Traceback" in err


NOTEBOOK = """
import gc, os, runpy, signal, sys, threading
handler, backend = signal.getsignal(signal.SIGINT), os.environ.get("MPLBACKEND")
threshold, frozen = gc.get_threshold(), gc.get_freeze_count()  # CPython 3.12 自己就凍了幾百個
for script, flags in {runs!r}:
    get_ipython().run_line_magic("run", f'"{{script}}" {{flags}}')
    assert signal.getsignal(signal.SIGINT) is handler, script
    assert os.environ.get("MPLBACKEND") == backend, script
    assert gc.get_threshold() == threshold and gc.get_freeze_count() < frozen + 10_000, script
script, flags = {runs!r}[0]
sys.argv = [script, *flags.split(), "--seed", "9"]
thread = threading.Thread(target=runpy.run_path, args=(script,), kwargs={{"run_name": "__main__"}})
thread.start()
thread.join()
import matplotlib.pyplot as plt
sys.path.insert(0, os.path.dirname(script))
import Q_Learning
print("READY", Q_Learning.train(Q_Learning.Config(episodes=50)).episodes, plt.get_backend())
"""


def test_in_a_jupyter_kernel(tmp_path):
    """真的核心：%run 每一課、從執行緒裡跑、匯入函式；Ctrl-C 與畫圖的後端都還給核心。"""
    runs = [(str(script(name)), f"{SHORT[name]} --out-dir {tmp_path / name}") for name in lessons.LESSONS]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK.format(runs=runs))])
    client = nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=lessons.short_environment() | {"PYTHONPATH": ""})
    printed = "".join(output.get("text", "") for output in notebook.cells[0].outputs)
    ready = next(line for line in printed.splitlines() if line.startswith("READY 50 "))
    assert "inline" in ready
    for name in lessons.LESSONS:
        assert metrics(tmp_path / name)["lesson"] == name
    assert metrics(tmp_path / LESSON)["seed"] == 9


# 權重檔


def damaged_files(folder, whole: bytes, arrays: dict) -> list[str]:
    """空的、截斷的、不是 npz 的、少一個陣列的、形狀不對的、NaN、字串、整數。"""
    name, first = next(iter(arrays.items()))
    contents = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"not weights", "json": json.dumps({}).encode()}
    for kind, content in contents.items():
        (folder / f"{kind}.npz").write_bytes(content)
    np.save(folder / "array.npy", first)
    changed = {
        "nan": np.full_like(first, np.nan),
        "strings": np.full(first.shape, "x"),
        "integers": np.zeros(first.shape, int),
        "shape": first[:1],
    }
    for kind, array in changed.items():
        np.savez(folder / f"{kind}.npz", **(arrays | {name: array}))
    np.savez(folder / "missing.npz", **{key: value for key, value in arrays.items() if key != name})
    return sorted(path.name for path in folder.iterdir())


def test_damaged_weights_are_refused_in_one_sentence(tmp_path):
    module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    lesson_extras.save_weights(tmp_path / "whole.npz", module)
    arrays = dict(np.load(tmp_path / "whole.npz"))
    (tmp_path / "damaged").mkdir()
    for name in [*damaged_files(tmp_path / "damaged", (tmp_path / "whole.npz").read_bytes(), arrays), "absent.npz"]:
        with pytest.raises(lesson.LessonError) as refused:
            lesson_extras.load_weights(tmp_path / "damaged" / name, module, "--watch")
        assert refused.value.args[1] == 2
        assert refused.value.args[0].startswith(f"--watch {tmp_path / 'damaged' / name} 讀不出這一課的權重")
        assert "\n" not in refused.value.args[0], name
    os.mkfifo(tmp_path / "pipe")
    for other_kind in (tmp_path / "pipe", tmp_path, Path("")):  # 管線會一直等人寫
        with pytest.raises(lesson.LessonError, match="不是檔案"):
            lesson_extras.load_weights(other_kind, module, "--watch")
    other = nnx.Linear(3, 2, rngs=nnx.Rngs(1))
    lesson_extras.load_weights(tmp_path / "whole.npz", other, "--watch")
    np.testing.assert_array_equal(other.kernel[...], module.kernel[...])


# 看它玩


def watched(play, tmp_path, stopped: bool = False):
    module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    lesson_extras.save_weights(tmp_path / "weights.npz", module)
    config = load(JAX_LESSON).Config(watch=tmp_path / "weights.npz", out_dir=tmp_path)
    run_now = lesson.Run("test", str(script(LESSON)))
    if stopped:
        run_now.stop.set()
    lesson_extras.watch(run_now, play, module, config, 50)


def test_ctrl_c_ends_watching_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(lesson_extras, "has_display", lambda: True)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        start = time.monotonic()
        with pytest.raises(SystemExit) as stopped:
            watched(lambda agent, mode, number=number: (os.kill(os.getpid(), number), time.sleep(60)), tmp_path)
        assert stopped.value.code == 130
        assert time.monotonic() - start < 30
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_ctrl_c_before_watching_watches_nothing(tmp_path):
    """建立智慧體的時候按的：旗標設了，就不再往下看。"""
    with pytest.raises(SystemExit) as stopped:
        watched(None, tmp_path, stopped=True)
    assert stopped.value.code == 130
    assert not (tmp_path / "watch.gif").exists()


def test_a_display_that_is_gone_gives_a_gif(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DISPLAY", ":77")
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-77")
    monkeypatch.delenv("SDL_VIDEODRIVER", raising=False)
    modes = []
    frames = [np.full((4, 4, 3), gray, np.uint8) for gray in (0, 255)]
    watched(lambda agent, mode: modes.append(mode) or frames, tmp_path)
    assert modes == ["rgb_array"]
    assert "沒有螢幕" in capsys.readouterr().out
    with Image.open(tmp_path / "watch.gif") as picture:
        assert picture.info["duration"] == 50


def test_weights_are_watched_with_the_flag_they_were_trained_with(tmp_path):
    settings = {"normalize_observations": False, "compare": False}
    (tmp_path / "metrics.json").write_text(json.dumps({"config": settings}))
    with pytest.raises(lesson.LessonError, match="--no-normalize-observations 訓練的"):
        watched(None, tmp_path)
    compared = json.dumps({"config": settings | {"compare": True}})  # --compare 不存權重：不是那一次訓練的
    for content in (compared, "{", "[]", '{"config": null}'):  # 或不是我們寫的，就不核對
        (tmp_path / "metrics.json").write_text(content)
        watched(lambda agent, mode: [np.zeros((4, 4, 3), np.uint8)], tmp_path)


def test_too_few_seeds_give_no_interval_and_no_verdict():
    """--compare 中斷得早：一個種子不是區間寬度為 0，是沒有區間。"""
    for values in ([93.0], [92.0, 94.0]):
        assert lesson_extras.show_mean(values) == "93.0 [—]"
        assert lesson_extras.show_difference(values, [90.0] * len(values)) == "+3.0 [—]，種子太少"
    assert lesson_extras.show_difference([1.0, 2.0, 3.0], [0.0] * 3).endswith("，較好")


def test_figures_use_the_seeds_that_every_row_has():
    rows = {"a": {"x": [1, 2, 3], "only_here": [7, 8, 9]}, "b": {"x": [4, 5]}}
    assert lesson_extras.draw_whole(rows) == {"a": {"x": [1, 2], "only_here": [7, 8]}, "b": {"x": [4, 5]}}


def test_an_interval_of_values_that_differ_in_the_last_bit(recwarn):
    values = [0.1 + 0.2, 0.3, 0.3, 0.3]
    low, high = lesson_extras.interval(values)
    assert low == high == pytest.approx(0.3)
    assert not recwarn.list
