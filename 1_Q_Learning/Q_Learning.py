"""第 1 課：用一張表學會走迷宮，Q-Learning (模組一、二)。

問題：沒有地圖、沒有人教，只有走完每一步之後的一個分數。怎麼學會最短的路？怎麼知道真的學會了？

    python 1_Q_Learning/Q_Learning.py                 訓練 20,000 個回合，和精確解比對，畫圖
    python 1_Q_Learning/Q_Learning.py --slip 0.2      地板會滑：五步有一步走到隨機的方向
    python 1_Q_Learning/Q_Learning.py --compare       四種探索方式、兩種初始值，各跑十個隨機種子

結果在 outputs/：q_values.png、value_spread.png、learning_curve.png、metrics.json。

出處：Q-learning：Watkins (1989)、Watkins 與 Dayan (1992)。
更新式：Sutton 與 Barto (2018)，Reinforcement Learning: An Introduction，第二版，式 (6.8)；價值迭代：式 (4.10)。
"""

import time

PROCESS_START = time.perf_counter()  # 在匯入之前記下：回報的總時間從這裡算起

import contextlib
import importlib.metadata
import io
import json
import math
import platform
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

import matplotlib
import numpy as np
import tyro
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.collections import EllipseCollection, PolyCollection

ACTIONS = ("up", "down", "left", "right")
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))  # 每個動作走 (幾列, 幾行)
ARROWS = "↑↓←→"
GOAL_REWARD, STEP_REWARD = 100.0, -1.0
TIE = 1e-6  # Q 值差這麼少的動作算一樣好
TARGET_ERROR = 1e-6
EVAL_EPISODES = 1_000
SPREAD_EPISODES = (1, 10, 100, 1_000)  # value_spread.png 畫這幾個回合之後的價值
CURVE_POINTS = 200
COMPARE_SEEDS, COMPARE_POINTS = 10, 40
PESSIMISTIC_Q = -200.0  # 比一直撞牆還差：撞牆的價值是 -1 / (1 - γ) = -100

# 1. 超參數 -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """超參數的唯一來源：命令列、README 的表格與測試都讀這裡。"""

    seed: int = 42
    """隨機種子 (seed)"""
    grid_size: int = 4
    """網格的邊長；狀態有邊長 × 邊長個"""
    slip: float = 0.0
    """地板多滑：每一步有這個機率走到隨機的方向"""
    episodes: int = 20_000
    """訓練幾個回合"""
    max_steps: int = 100
    """一個回合最多走幾步"""
    alpha: float = 0.1
    """學習率 α：每次更新往 TD 目標走幾分之幾"""
    gamma: float = 0.99
    """折扣因子 γ"""
    initial_q: float = 0.0
    """Q 表的初始值；終點永遠是 0"""
    epsilon_start: float = 1.0
    """第一個回合的 ε：隨機選動作的機率"""
    epsilon_end: float = 0.01
    """ε 最後降到多少"""
    decay_episodes: int = 10_000
    """ε 用幾個回合線性降到底"""
    compare: bool = False
    """四種探索方式、兩種初始值，各跑十個隨機種子，畫在一起"""
    out_dir: Path = Path(__file__).resolve().parent / "outputs"
    """結果放在哪裡"""


BOUNDS = {  # 每個數值旗標的下限與上限
    "seed": (0, 2**32 - 1),
    "grid_size": (2, 12),
    "slip": (0, 1),
    "episodes": (1, math.inf),
    "max_steps": (1, math.inf),
    "alpha": (0, 1),
    "gamma": (0, 1),
    "initial_q": (-1e6, 1e6),
    "epsilon_start": (0, 1),
    "epsilon_end": (0, 1),
    "decay_episodes": (1, math.inf),
}


def check(config: Config) -> None:
    """不合理的值在做任何事之前就拒絕 (結束狀態 2)。"""
    require_bounds(config, BOUNDS)
    shortest = 2 * (config.grid_size - 1)
    require(
        config.max_steps >= shortest,
        f"--max-steps 是 {config.max_steps}",
        f"從起點到終點至少要 {shortest} 步，要在這以上",
    )


# 2. 環境 ---------------------------------------------------------------------------------------------


class GridWorld:
    """size × size 的網格：起點在左上角 (狀態 0)，終點在右下角，撞牆就留在原地。

    狀態由左到右、由上到下編號；動作 0 到 3 是上、下、左、右。
    三個陣列的形狀都是 (狀態, 動作)：走過去是哪個狀態、拿到多少獎勵、是不是終止。
    """

    def __init__(self, size: int, slip: float = 0.0):
        self.size, self.slip = size, slip
        self.goal = size * size - 1
        shape = (size * size, len(ACTIONS))
        self.next_state, self.reward = np.zeros(shape, int), np.full(shape, STEP_REWARD)
        for state, action in np.ndindex(shape):
            row, column = np.add(divmod(state, size), MOVES[action]).clip(0, size - 1)
            self.next_state[state, action] = row * size + column
        self.reward[self.next_state == self.goal] = GOAL_REWARD
        self.next_state[self.goal], self.reward[self.goal] = self.goal, 0.0  # 終點之後什麼都不會再發生
        self.terminated = self.next_state == self.goal
        self.outcomes = {  # 一次只查一格時，字典比陣列快
            (s, a): (int(self.next_state[s, a]), float(self.reward[s, a]), bool(self.terminated[s, a]))
            for s, a in np.ndindex(shape)
        }

    def step(self, state: int, action: int, uniform: Iterator[float]) -> tuple[int, float, bool]:
        """走一步；回傳 (下一個狀態, 獎勵, 是否終止)。地板滑的時候，動作換成隨機的一個。"""
        if self.slip and next(uniform) < self.slip:
            action = int(len(ACTIONS) * next(uniform))
        return self.outcomes[state, action]


def value_iteration(grid: GridWorld, gamma: float) -> np.ndarray:
    """精確的 Q*，形狀 (狀態, 動作)：知道環境的規則時，反覆套用 Bellman 最佳方程式，直到不再改變。

    Sutton 與 Barto 式 (4.10) 的 Q 版本。智慧體看不到這些規則，這裡只拿它當裁判。
    """
    q_star, change = np.zeros(grid.reward.shape), math.inf
    while change > 1e-12:
        values = q_star.max(axis=1)
        outcome = grid.reward + gamma * ~grid.terminated * values[grid.next_state]
        updated = (1 - grid.slip) * outcome + grid.slip * outcome.mean(axis=1, keepdims=True)
        q_star, change = updated, np.abs(updated - q_star).max()
    return q_star


# 3. 網路：這一課沒有，只有一張表 ---------------------------------------------------------------------


def make_q_table(grid: GridWorld, initial_q: float = 0.0) -> list[list[float]]:
    """q_table[狀態][動作]，預設等於 np.zeros((16, 4))；終點沒有未來，永遠是 0。"""
    q_table = np.full(grid.reward.shape, initial_q)
    q_table[grid.goal] = 0.0
    return q_table.tolist()  # 逐格讀寫時，串列比陣列快


# 4. 記憶：這一課也沒有，每一步學完就忘 ---------------------------------------------------------------


# 5. 智慧體 -------------------------------------------------------------------------------------------


def uniforms(rng: np.random.Generator) -> Iterator[float]:
    """[0, 1) 的亂數：一次抽一萬個，再一個一個發，省下一個一個呼叫 NumPy 的時間。"""
    while True:
        yield from rng.random(10_000).tolist()


def epsilon_at(episode: int, config: Config) -> float:
    """第 episode 個回合 (從 0 算) 的 ε：線性從 epsilon_start 降到 epsilon_end，之後不變。"""
    progress = min(1.0, episode / config.decay_episodes)
    return config.epsilon_start + progress * (config.epsilon_end - config.epsilon_start)


def select_action(q_table, state: int, epsilon: float, uniform: Iterator[float]) -> int:
    """ε-貪婪 (ε-greedy)：以機率 ε 探索，其餘利用。平手時取編號最小的動作。"""
    if next(uniform) < epsilon:
        return int(len(ACTIONS) * next(uniform))  # 探索
    return q_table[state].index(max(q_table[state]))  # 利用


def td_update(q_table, state, action, reward, next_state, terminated, alpha, gamma) -> float:
    """用一步的經驗更新 Q(S, A)，Sutton 與 Barto 式 (6.8)；回傳 TD 誤差。

    終止之後沒有未來，所以不從終點自助；步數用完只是時間到了，照樣自助。
    """
    future = 0.0 if terminated else max(q_table[next_state])
    td_target = reward + gamma * future
    td_error = td_target - q_table[state][action]
    q_table[state][action] += alpha * td_error
    return td_error


def play_episode(q_table, grid: GridWorld, epsilon: float, config: Config, uniform: Iterator[float]):
    """從起點走一個回合，每走一步就學一步；回傳這個回合的回報 (獎勵的總和，不打折) 與步數。"""
    state, total = 0, 0.0
    for step in range(1, config.max_steps + 1):
        action = select_action(q_table, state, epsilon, uniform)
        next_state, reward, terminated = grid.step(state, action, uniform)
        td_update(q_table, state, action, reward, next_state, terminated, config.alpha, config.gamma)
        state, total = next_state, total + reward
        if terminated:
            return total, step
    return total, config.max_steps


# 6. 訓練 ---------------------------------------------------------------------------------------------


@dataclass
class Result:
    q_table: np.ndarray  # (狀態, 動作)
    q_star: np.ndarray  # 價值迭代的精確解，同樣的形狀
    episodes: int  # 走完幾個回合
    env_steps: int  # 一共走了幾步
    curve: list[tuple[int, float, float]]  # (回合, 這一段的平均回報, 與 Q* 的最大差距)
    spread: dict[int, np.ndarray]  # 第幾個回合之後 → 每個狀態的價值
    seconds: float
    interrupted: bool  # 被 Ctrl-C 提早結束


def max_abs_error(q_table, q_star: np.ndarray) -> float:
    """所有 (狀態, 動作) 裡，|Q − Q*| 最大的一個；終點的四格兩邊都是 0。"""
    return float(np.abs(np.array(q_table) - q_star).max())


def train(config: Config, stop: threading.Event | None = None, progress: bool = True) -> Result:
    """照 config 訓練一張 Q 表；stop 被設定時，停在兩個回合之間。"""
    start = time.perf_counter()
    grid = GridWorld(config.grid_size, config.slip)
    q_table, q_star = make_q_table(grid, config.initial_q), value_iteration(grid, config.gamma)
    uniform = uniforms(np.random.default_rng(config.seed))
    returns, env_steps, curve, spread = [], 0, [], {}
    every = max(1, config.episodes // CURVE_POINTS)
    with tqdm(total=config.episodes, desc="訓練", unit="回合", disable=None if progress else True) as bar:
        for episode in range(config.episodes):
            if stop and stop.is_set():
                break
            episode_return, steps = play_episode(q_table, grid, epsilon_at(episode, config), config, uniform)
            returns.append(episode_return)
            env_steps += steps

            done = len(returns)
            if done in SPREAD_EPISODES:
                spread[done] = np.max(q_table, axis=1)
            if done % every == 0:
                curve.append((done, float(np.mean(returns[-every:])), max_abs_error(q_table, q_star)))
                bar.set_postfix_str(f"平均回報 {curve[-1][1]:.0f}，與 Q* 的最大差距 {curve[-1][2]:.0e}")
                bar.update(every)
    seconds, interrupted = time.perf_counter() - start, len(returns) < config.episodes
    return Result(np.array(q_table), q_star, len(returns), env_steps, curve, spread, seconds, interrupted)


# 7. 評估 ---------------------------------------------------------------------------------------------


def evaluate(q_table: np.ndarray, config: Config) -> float:
    """貪婪地 (ε = 0) 從起點走 1,000 個回合的平均回報；亂數固定，每張表遇到同樣的滑倒。"""
    grid, uniform = GridWorld(config.grid_size, config.slip), uniforms(np.random.default_rng(0))
    policy, total = q_table.argmax(axis=1).tolist(), 0.0
    for _ in range(EVAL_EPISODES):
        state = 0
        for _ in range(config.max_steps):
            state, reward, terminated = grid.step(state, policy[state], uniform)
            total += reward
            if terminated:
                break
    return total / EVAL_EPISODES


def best_actions(q_values: np.ndarray) -> np.ndarray:
    """一個狀態所有一樣好的最佳動作，例如起點的下與右。"""
    return np.flatnonzero(q_values >= q_values.max() - TIE)


def optimal_states(q_table: np.ndarray, q_star: np.ndarray) -> float:
    """貪婪動作真的是最佳動作的狀態，佔終點以外所有狀態的比率。"""
    chosen = np.take_along_axis(q_star, q_table.argmax(axis=1)[:, None], axis=1)[:, 0]
    return float(np.mean((chosen >= q_star.max(axis=1) - TIE)[:-1]))


def describe(q_table: np.ndarray, size: int) -> str:
    """印給人看的結果：策略、價值、Q 表。"""
    goal = size * size - 1
    cells = ["".join(ARROWS[action] for action in best_actions(q_values)) for q_values in q_table]
    cells[goal] = "G"
    values = [f"{value:z.2f}" for value in q_table.max(axis=1)]
    lines = ["貪婪策略 (一樣好的動作都列出來；G 是終點)："]
    lines += ["".join(f"{cell:>7}" for cell in cells[first : first + size]) for first in range(0, goal, size)]
    lines += ["", "每個狀態的價值 V(s) = max Q(s, a)："]
    lines += ["".join(f"{value:>9}" for value in values[first : first + size]) for first in range(0, goal, size)]
    lines += ["", "Q 表 (一列一個狀態)：", "  狀態" + "".join(f"{arrow:>9}" for arrow in ARROWS)]
    lines += [f"{state:6}" + "".join(f"{q:z9.2f}" for q in q_values) for state, q_values in enumerate(q_table)]
    return "\n".join(lines) + "\n"


# 8. 圖：訓練不到一秒，所以連自動排版 (layout) 的半秒也省下來 ---------------------------------------


def plot_style() -> None:
    """所有課共用的樣式：白底、色盲也分得清的顏色 (Okabe-Ito)。"""
    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    figure = {"figure.dpi": 110, "figure.facecolor": "white", "figure.constrained_layout.use": True}
    axes = {"axes.prop_cycle": plt.cycler(color=colors), "axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams.update(figure | axes | {"axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False})


def save_figure(figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)


def draw_q_values(result: Result, config: Config) -> None:
    """每一格切成四個三角形，顏色與數字是那個動作的 Q 值；中央的箭頭是最佳動作，平手的都畫。"""
    size, goal = config.grid_size, config.grid_size**2 - 1
    figure, axes = plt.subplots(figsize=(1.5 * size + 1.4, 1.5 * size + 0.6), layout="none")
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.02, top=0.9)
    edges = (((0, 0), (1, 0)), ((0, 1), (1, 1)), ((0, 0), (0, 1)), ((1, 0), (1, 1)))  # 上、下、左、右的那條邊
    colors = result.q_table[:goal]
    middle = (colors.min() + colors.max()) / 2
    triangles, arrows = [], []
    for state, action in np.ndindex(colors.shape):
        row, column = divmod(state, size)
        triangles.append([(column + x, row + y) for x, y in (*edges[action], (0.5, 0.5))])
        down, right = MOVES[action]
        x, y, q = column + 0.5 + 0.355 * right, row + 0.5 + 0.39 * down, colors[state, action]
        axes.text(x, y, f"{q:z.1f}", ha="center", va="center", fontsize=8.5, color="black" if q > middle else "white")
        if action in best_actions(colors[state]):
            arrows.append((column + 0.5, row + 0.5, 0.19 * right, 0.19 * down))
    cells = PolyCollection(triangles, array=colors.ravel(), cmap="cividis", edgecolors="white", linewidths=0.5)
    axes.add_collection(cells)
    x, y = np.arange(goal) % size + 0.5, np.arange(goal) // size + 0.5
    discs = EllipseCollection(0.42, 0.42, 0, units="xy", offsets=np.stack([x, y], axis=1), color="white")
    discs.set_offset_transform(axes.transData)
    axes.add_collection(discs)
    xyuv = np.array(arrows).T
    axes.quiver(
        *xyuv,
        angles="xy",
        scale_units="xy",
        scale=1,
        units="xy",
        width=0.03,
        headwidth=4.5,
        headlength=4,
        headaxislength=4,
        zorder=3,
    )
    for (column, row), label in {(0, 0): "START", (size - 1, size - 1): "GOAL"}.items():
        axes.add_patch(plt.Rectangle((column, row), 1, 1, fill=False, lw=3, color="C1", zorder=4, clip_on=False))
        y = row + (0.5 if label == "GOAL" else -0.06)
        axes.text(column + 0.5, y, label, ha="center", va="center" if y > 0 else "bottom", color="C1", weight="bold")
    axes.set(xlim=(0, size), ylim=(size, 0), aspect="equal", xticks=[], yticks=[])
    axes.set_title("Q(s, a) for each direction; arrows: best actions", pad=22)
    axes.spines[:].set_visible(False)
    figure.colorbar(cells, label="Q(s, a)", shrink=0.8)
    save_figure(figure, config.out_dir / "q_values.png")


def draw_value_spread(result: Result, config: Config) -> None:
    """幾個回合之後每個狀態的價值，最右邊是精確解：價值從終點一格一格往回流。"""
    tables = {f"after episode {episode:,}": values for episode, values in result.spread.items()}
    tables["exact optimum"] = result.q_star.max(axis=1)
    size, goal = config.grid_size, config.grid_size**2 - 1
    low, high = min(values.min() for values in tables.values()), max(values.max() for values in tables.values())
    shape = (0.62 * size * len(tables), 0.62 * size + 0.3)
    figure, panels = plt.subplots(1, len(tables), figsize=shape, squeeze=False, layout="none")
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=1 - 0.32 / shape[1], wspace=0.03)
    for axes, (title, values) in zip(panels[0], tables.items(), strict=True):
        shown = np.append(values[:goal], np.nan).reshape(size, size)  # 終點留白
        axes.imshow(shown, cmap="cividis", vmin=low, vmax=high)
        for (row, column), value in np.ndenumerate(shown):
            color = "black" if value > (low + high) / 2 else "white"
            text = (
                {"s": "GOAL", "color": "C1", "weight": "bold"}
                if np.isnan(value)
                else {"s": round(value), "color": color}
            )
            axes.text(column, row, ha="center", va="center", fontsize=9, **text)
        axes.set(title=title, xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.grid(False)
    save_figure(figure, config.out_dir / "value_spread.png")


def draw_learning_curve(result: Result, optimal_return: float, config: Config) -> None:
    """回報、ε、與 Q* 的差距，共用一條橫軸。"""
    figure, panels = plt.subplots(3, 1, figsize=(7, 6.4), sharex=True, height_ratios=[3, 1.4, 2], layout="none")
    figure.subplots_adjust(left=0.13, right=0.97, bottom=0.08, top=0.94, hspace=0.12)
    top, middle, bottom = panels
    if result.curve:
        episodes, returns, errors = np.array(result.curve).T
        top.plot(episodes, returns, label="training episodes (ε-greedy), block mean")
        bottom.semilogy(episodes, np.maximum(errors, 1e-16), color="C3")
    top.axhline(optimal_return, color="C2", linestyle="--", label=f"best possible: {optimal_return:.0f}")
    top.set(ylabel="return", title=f"Q-learning on a {config.grid_size}×{config.grid_size} grid")
    top.legend(loc="lower right")
    played = np.linspace(0, result.episodes, 401)
    middle.plot(played, [epsilon_at(episode, config) for episode in played], color="C1")
    middle.set(ylabel="ε", ylim=(-0.05, 1.05))
    bottom.axhline(TARGET_ERROR, color="0.4", linestyle=":", label=f"target: {TARGET_ERROR:.0e}")
    bottom.set(ylabel="max |Q − Q*|", xlabel="episode")
    bottom.yaxis.set_major_formatter("{x:.0e}")
    bottom.legend(loc="upper right")
    save_figure(figure, config.out_dir / "learning_curve.png")


# 9. 比較 ---------------------------------------------------------------------------------------------


def variants(config: Config) -> dict[str, Config]:
    """四種探索方式：config 的遞減，以及三種固定的 ε。各從兩張表開始：config 的初始值，與悲觀的初始值。"""
    explorations = {f"ε: {config.epsilon_start} → {config.epsilon_end}": config}
    explorations |= {f"ε = {e}": replace(config, epsilon_start=e, epsilon_end=e) for e in (0.01, 0.1, 1.0)}
    starts = (config.initial_q, PESSIMISTIC_Q)
    return {f"{name}, Q₀ = {q:g}": replace(c, initial_q=q) for q in starts for name, c in explorations.items()}


def compare(config: Config, stop: threading.Event) -> dict:
    """每種探索方式各跑 COMPARE_SEEDS 個隨機種子；回傳每一種的曲線與數字。"""
    columns = ("episodes", "returns", "errors", "mean_returns", "final_errors", "greedy_returns", "optimal_states")
    rows = {name: {column: [] for column in columns} for name in variants(config)}
    runs = [(seed, name, variant) for seed in range(COMPARE_SEEDS) for name, variant in variants(config).items()]
    for seed, name, variant in tqdm(runs, desc="比較", unit="次訓練"):
        result, row = train(replace(variant, seed=seed), stop, progress=False), rows[name]
        if result.interrupted:
            break
        episodes, returns, errors = np.array(result.curve).T
        shown = np.unique(np.geomspace(1, len(episodes), COMPARE_POINTS).astype(int)) - 1  # 橫軸是對數
        row["episodes"] = episodes[shown].tolist()
        row["returns"].append(returns[shown].tolist())
        row["errors"].append(errors[shown].tolist())
        row["mean_returns"].append(float(returns.mean()))
        row["final_errors"].append(max_abs_error(result.q_table, result.q_star))
        row["greedy_returns"].append(evaluate(result.q_table, config))
        row["optimal_states"].append(optimal_states(result.q_table, result.q_star))
    return {name: row for name, row in rows.items() if row["final_errors"]}


def comparison_table(rows: dict) -> str:
    """Markdown 表格：學習時付出的代價，與最後學到的東西。"""
    names = ("探索方式", "學習時的平均回報", "最後的貪婪回報", "動作選對的狀態", "與 Q* 的最大差距", "最差的種子")
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for name, row in rows.items():
        errors = row["final_errors"]
        cells = [f"{np.mean(row['mean_returns']):.1f}", f"{np.mean(row['greedy_returns']):.1f}"]
        cells += [f"{100 * np.mean(row['optimal_states']):.0f} %", f"{np.median(errors):.1e}", f"{max(errors):.1e}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_comparison(rows: dict, out_dir: Path) -> None:
    """comparison.png：學習時拿到的回報、離精確解多遠，以及從悲觀的表開始時的回報。"""
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.4))
    for i, (name, row) in enumerate(rows.items()):
        color, label = f"C{i % 4}", name.split(", ")[0]
        style = {"color": color, "linestyle": ("-", "--", ":", "-.")[i % 4], "lw": 2.2, "label": label}
        panels[0 if i < 4 else 2].plot(row["episodes"], np.mean(row["returns"], axis=0), **style)
        if i < 4:
            errors = np.maximum(row["errors"], 1e-16)
            panels[1].plot(row["episodes"], np.median(errors, axis=0), **style)
            panels[1].fill_between(row["episodes"], errors.min(axis=0), errors.max(axis=0), color=color, alpha=0.15)
    for axes in panels:
        axes.set(xlabel="episode", xscale="log", ylabel="return (mean of the seeds)")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    panels[0].set_title("what learning costs")
    panels[1].set(title="what is learnt", ylabel="max |Q − Q*| (median, range)", yscale="log")
    panels[1].yaxis.set_major_formatter("{x:.0e}")
    panels[1].legend(loc="center right", fontsize=11)
    panels[2].set_title(f"what learning costs when the table starts at {PESSIMISTIC_Q:.0f}")
    save_figure(figure, out_dir / "comparison.png")


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
    config = parse_config(Config, "第 1 課：用一張表學會走迷宮，Q-Learning")
    check(config)
    prepare_out_dir(config.out_dir)
    stop = stop_on_ctrl_c()
    plot_style()
    device = {"platform": "cpu", "count": 1}
    if config.compare:
        rows = compare(config, stop)
        table = comparison_table(rows)
        if rows:
            draw_comparison(rows, config.out_dir)
        (config.out_dir / "comparison.md").write_text(table, encoding="utf-8")
        save_metrics(config, time.perf_counter() - PROCESS_START, device, comparison=rows)
        print(table)
        return finish(config, stop.is_set(), f"完成 {sum(len(row['final_errors']) for row in rows.values())} 次訓練")

    result = train(config, stop)
    error = max_abs_error(result.q_table, result.q_star)
    greedy_return, optimal_return = evaluate(result.q_table, config), evaluate(result.q_star, config)
    draw_q_values(result, config)
    draw_value_spread(result, config)
    draw_learning_curve(result, optimal_return, config)
    results = {"max_abs_error": error, "greedy_return": greedy_return, "optimal_return": optimal_return}
    results |= {"episodes": result.episodes, "env_steps": result.env_steps, "curve": result.curve}
    results |= {"q_table": result.q_table.tolist(), "memory_bytes": {"parameters": result.q_table.nbytes}}
    save_metrics(config, result.seconds, device, **results)
    print(describe(result.q_table, config.grid_size))
    print(f"貪婪策略從起點走 {EVAL_EPISODES:,} 個回合的平均回報 {greedy_return:.1f}，最佳策略 {optimal_return:.1f}")
    reached = "達標" if error <= TARGET_ERROR else "未達標"
    print(f"{reached}：與 Q* 的最大差距 {error:.1e}（目標 {TARGET_ERROR:.0e}）")
    finish(config, result.interrupted, f"走完 {result.episodes} 個回合")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
