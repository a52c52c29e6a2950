"""每一課的 *_extras.py 共用的工具：權重、比較、表格、圖、動畫。和 lesson.py 一樣，每個資料夾裡的都相同。"""

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from tqdm import tqdm

from lesson import LessonError, Run, save

SEEDS = range(1000, 1010)  # 表格與圖用的隨機種子；調整設定只看 0 到 9
COLORS = [matplotlib.color_sequences["okabe_ito"][i] for i in (5, 6, 3, 7, 1, 2, 0)]  # 不用黃色：白底上看不清
STYLE = {
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.dpi": 110,
}


def compare(run: Run, config, variants: dict, measure: Callable, table: Callable, draw: Callable) -> None:
    """--compare：每個隨機種子、每種設定各跑一次 measure(設定的名字, config) → {欄: 值}，存檔、印出表格、畫圖。

    rows 是 {設定: {欄: [一個種子一個值]}}：table(rows) 是 Markdown 表格，draw(rows, out_dir) 畫圖，
    每一種設定至少跑完一個種子才畫。有一次訓練發散了，就說是哪一次；以前完成的照樣存下來。
    """
    if config.seed != type(config).seed:
        raise LessonError("--compare 與 --seed 一起用；--compare 跑固定的十個隨機種子，不要寫 --seed", 2)
    rows, done, failure, jobs = {}, 0, None, [(seed, name) for seed in SEEDS for name in variants]
    for seed, name in tqdm(jobs, "比較", unit="次訓練", disable=None):
        try:
            measured = measure(name, replace(variants[name], seed=seed))
        except LessonError as error:
            failure = LessonError(f"{name}、隨機種子 {seed}：{error.args[0]}", error.args[1])
            break
        if run.stop.is_set():  # 練到一半的不算
            break
        for column, value in measured.items():
            rows.setdefault(name, {}).setdefault(column, []).append(value)
        done += 1
    if failure and not done:
        raise failure
    run.require_learnt(done)
    run.save_metrics(config, time.perf_counter() - run.started, comparison=rows)
    save(config.out_dir / "comparison.md", table(rows).encode())
    if len(rows) == len(variants):
        draw(rows, config.out_dir)
    else:
        print("沒有畫圖：不是每一種設定都跑完了一個隨機種子；資料夾裡若有 comparison.png，是以前的")
    print(table(rows))
    if failure:
        raise failure
    run.finish(config, f"完成 {done} 次訓練" if done < len(jobs) else "")


def refuse_changed(config, because: str, names: Iterable[str]) -> None:
    """because 用不到或自己決定這些旗標，所以要是預設值；不是就丟出 ValueError。"""
    for name in names:
        value = getattr(config, name)
        if value != getattr(type(config), name):
            flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
            raise ValueError(f"{because} 配上 {flag}；這時用不到它，或由 {because} 決定，不要寫")


def derive(name: str, config, **changes):
    """--compare 的一種設定：config 改掉 changes；不能跑就說是哪一種。"""
    try:
        return replace(config, compare=False, **changes)
    except ValueError as error:
        raise ValueError(f"--compare 的 {name}：{error}") from error


def interval(values: Iterable[float]) -> tuple[float, float]:
    """平均的 95 % 信賴區間，拔靴法 (bootstrap)；亂數固定，同樣的數字給同樣的區間。不到三個值，沒有區間 (nan)。"""
    from scipy.stats import bootstrap

    values = np.array(values, float)
    if len(values) < 3:
        return np.nan, np.nan
    if np.ptp(values) <= 1e-12 * np.abs(values).max():  # 每個都一樣 (差在最後一個位元也算)，沒有東西可以重抽
        return values[0], values[0]
    return tuple(bootstrap((values,), np.mean, rng=0).confidence_interval)


def show_mean(values: Iterable[float], pattern: str = "{:.1f}") -> str:
    """平均 [區間的下限, 上限]，例如 −148.0 [−149.1, −147.0]；中斷得早，種子太少時是 −148.0 [—]。"""
    low, high = interval(values)
    if np.isnan(low):
        return f"{pattern.format(np.mean(values))} [—]"
    return f"{pattern.format(np.mean(values))} [{pattern.format(low)}, {pattern.format(high)}]"


def show_difference(values, reference, pattern: str = "{:+.1f}", higher_is_better: bool = True) -> str:
    """同樣的隨機種子一對一相減，平均 [區間]，以及區間撐得起的判斷。"""
    difference = np.subtract(values, reference)
    low, high = interval(difference)
    better = (low > 0) if higher_is_better else (high < 0)
    verdict = "看不出差別" if low <= 0 <= high else "較好" if better else "較差"
    if np.isnan(low):
        verdict = "種子太少"
    return f"{show_mean(difference, pattern)}，{verdict}"


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown 表格；header 是欄名，rows 的每一列是一樣多的格子。"""
    header = list(header)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (header, ["---"] * len(header), *rows))


@contextlib.contextmanager
def figure(path: Path, *grid: int, figsize: tuple[float, float], layout: str = "constrained", **options):
    """一張圖與它的座標軸，離開 with 時存成 path；不用 pyplot，讀者的後端與 matplotlibrc 都不相干。"""
    with style.context(STYLE, after_reset=True):
        canvas, buffer = Figure(figsize=figsize, layout=layout), io.BytesIO()
        yield canvas, canvas.subplots(*grid, **options)
        canvas.savefig(buffer, format="png")
        save(path, buffer.getvalue())


def draw_whole(rows: dict) -> dict:
    """中斷時，前面幾列多跑了一個種子；圖只畫每一列都有的種子，才能互相比。"""
    seeds = min(max(map(len, row.values())) for row in rows.values())
    return {name: {column: values[:seeds] for column, values in row.items()} for name, row in rows.items()}


def draw_mean(axes, x: Iterable[float], curves: list, **style) -> None:
    """各個隨機種子的平均，色帶是它的 95 % 信賴區間；curves 是 (種子, 點)。"""
    curves = np.array(curves)
    (line,) = axes.plot(x, curves.mean(axis=0), **style)
    low, high = np.transpose([interval(values) for values in curves.T])
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, lw=0)


def draw_error(values: Iterable[float]) -> np.ndarray:
    """長條圖的 xerr、yerr：平均到 95 % 信賴區間兩端的距離，(2, 1)。"""
    low, high = interval(values)
    return np.array([[np.mean(values) - low], [high - np.mean(values)]])


def save_gif(path: Path, frames: list[np.ndarray], milliseconds: int) -> None:
    """寬高各縮一半，一張 milliseconds 毫秒。"""
    from PIL import Image

    images, buffer = [Image.fromarray(frame[::2, ::2]).quantize(32) for frame in frames], io.BytesIO()
    images[0].save(buffer, format="gif", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    save(path, buffer.getvalue())


def has_display() -> bool:
    """有沒有開得了視窗的螢幕；最後問 SDL，因為環境變數 DISPLAY 指的螢幕可能已經不在了。"""
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        return False
    import pygame

    with contextlib.suppress(pygame.error):
        pygame.display.init()
        found = pygame.display.get_driver() not in ("dummy", "offscreen")
        pygame.display.quit()
        return found
    return False


def watch(run: Run, play: Callable, agent, config, milliseconds: int) -> None:
    """--watch：載入權重，在視窗裡玩一個回合；沒有螢幕就寫成 watch.gif。沒有東西要存，Ctrl-C 立刻結束。"""
    check_settings(config.watch, config)
    load_weights(config.watch, agent, "--watch")
    with end_at_once():
        run.require_learnt(False)  # 建立智慧體的時候就按了 Ctrl-C
        if has_display():
            play(agent, "human")
            return
        path = config.out_dir / "watch.gif"  # 不蓋掉訓練時存的 agent.gif
        save_gif(path, play(agent, "rgb_array"), milliseconds)
        print(f"沒有螢幕，畫面存在 {path}", flush=True)


def check_settings(path: Path, config) -> None:
    """權重看不出觀測正規化了沒有；旁邊有訓練時的 metrics.json，就核對。"""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # 沒有，或不是我們寫的
        settings = json.loads((path.parent / "metrics.json").read_bytes())["config"]
        trained = settings["normalize_observations"]
        if trained != config.normalize_observations and not settings["compare"]:  # --compare 不存權重
            flag = f"--{'' if trained else 'no-'}normalize-observations"
            raise LessonError(f"--watch {path} 是用 {flag} 訓練的；看的時候要用同樣的旗標", 2)


@contextlib.contextmanager
def end_at_once():
    """在這個 with 裡，Ctrl-C 與 SIGTERM 不等迴圈來看旗標，立刻以 130 結束；離開時還回去。"""
    main_thread = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if main_thread else ()
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in signals}
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def array_bytes(tree) -> int:
    """所有陣列一共幾個位元組；純量 (例如最佳化器數步數的那一個) 不算。"""
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim)


def named_weights(module) -> dict:
    """模組的每個權重 (nnx.Param)，名字像 actor/mu/kernel。"""
    from flax import nnx

    return {"/".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def save_weights(path: Path, module) -> None:
    """權重存成 .npz，一個陣列一個名字；不用 pickle。最後一次更新才發散，就丟出 LessonError，以前的權重還在。"""
    arrays, buffer = {name: np.asarray(param[...]) for name, param in named_weights(module).items()}, io.BytesIO()
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise LessonError("權重不是有限的數；把學習率調小再試", 1)
    np.savez(buffer, **arrays)
    save(path, buffer.getvalue())


def load_weights(path: Path, module, flag: str) -> None:
    """把 save_weights 的檔案讀回 module；flag 是使用者給檔名的旗標。"""
    try:
        if path.exists() and not path.is_file():  # 管線會一直等人寫
            raise ValueError("不是檔案")
        with np.load(path, allow_pickle=False) as arrays:
            loaded = {name: arrays[name] for name in named_weights(module)}
        for name, param in named_weights(module).items():
            array = loaded[name]
            if array.shape != param.shape or array.dtype != param.dtype or not np.isfinite(array).all():
                raise ValueError(f"{name} 要是 {param.shape} 的 {param.dtype}，而且都是有限的數")
            param[...] = array
    except Exception as error:  # 壞掉的檔案在 NumPy 與 zipfile 裡丟出各種例外
        reason = f"{flag} {path} 讀不出這一課的權重 ({error})"
        raise LessonError(f"{reason}；要是同樣的旗標訓練時存的 .npz", 2) from error
