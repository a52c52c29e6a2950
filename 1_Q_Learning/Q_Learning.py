"""第 1 課：用一張表學會走迷宮，Q-Learning (模組一、二)。

問題：沒有地圖、沒有人教，只有走完每一步之後的一個分數。怎麼學會最短的路？怎麼知道真的學會了？

    python 1_Q_Learning/Q_Learning.py                 訓練 20,000 個回合，和精確解比對，畫圖
    python 1_Q_Learning/Q_Learning.py --slip 0.2      地板會滑：五步有一步走到隨機的方向
    python 1_Q_Learning/Q_Learning.py --compare       四種探索方式、兩種初始值，各跑十個隨機種子

結果在 outputs/：q_values.png、value_spread.png、learning_curve.png、metrics.json。

出處：Q-learning：Watkins (1989)、Watkins 與 Dayan (1992)。
更新式：Sutton 與 Barto (2018)，Reinforcement Learning: An Introduction，第二版，式 (6.8)；價值迭代：式 (4.10)。
"""

import lesson

RUN = lesson.Run(__name__, __file__)  # 從這裡開始計時，Ctrl-C 也從這裡開始有人接

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import Q_Learning_extras as extras
from tqdm import tqdm

ACTIONS = ("up", "down", "left", "right")
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))  # 每個動作走 (幾列, 幾行)
GOAL_REWARD, STEP_REWARD = 100.0, -1.0
TARGET_ERROR = 1e-6
EVAL_EPISODES = 1_000
SPREAD_EPISODES = (1, 10, 100, 1_000)  # value_spread.png 畫這幾個回合之後的價值
CURVE_POINTS = 200

# 1. 超參數 -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """超參數的唯一來源：命令列、README 的表格與測試都讀這裡。"""

    seed: Annotated[int, (0, 2**32 - 1)] = 42  # 隨機種子 (seed)
    grid_size: Annotated[int, (2, 12)] = 4  # 網格的邊長；狀態有邊長 × 邊長個
    slip: Annotated[float, (0, 1)] = 0.0  # 地板多滑：每一步有這個機率走到隨機的方向
    episodes: Annotated[int, (1, 10**7)] = 20_000  # 訓練幾個回合
    max_steps: Annotated[int, (1, 10**6)] = 100  # 一個回合最多走幾步
    alpha: Annotated[float, (1e-6, 1)] = 0.1  # 學習率 α：每次更新往 TD 目標走幾分之幾
    alpha_decay: Annotated[float, (0, 1)] = 0.0  # 同一格第 n 次更新，α 除以 n 的這個次方；0 是不變
    gamma: Annotated[float, (0, 1)] = 0.99  # 折扣因子 γ
    initial_q: Annotated[float, (-1e6, 1e6)] = 0.0  # Q 表的初始值；終點永遠是 0
    epsilon_start: Annotated[float, (0, 1)] = 1.0  # 第一個回合的 ε：隨機選動作的機率
    epsilon_end: Annotated[float, (0, 1)] = 0.01  # ε 最後降到多少
    decay_episodes: Annotated[int, (1, 10**9)] = 10_000  # ε 用幾個回合線性降到底
    compare: bool = False  # 四種探索方式、兩種初始值，各跑十個隨機種子，畫在一起
    out_dir: Path = Path(__file__).resolve().parent / "outputs"  # 結果放在哪裡

    def __post_init__(self):
        lesson.check_bounds(self)
        shortest = 2 * (self.grid_size - 1)
        if self.max_steps < shortest:
            raise ValueError(f"--max-steps 是 {self.max_steps}；從起點到終點至少要 {shortest} 步，要在這以上")
        if self.compare and self.initial_q != 0:
            raise ValueError(f"--compare 配上 --initial-q {self.initial_q}；兩種初始值由 --compare 決定，不要自己寫")


# 2. 環境 ---------------------------------------------------------------------------------------------


class GridWorld:
    """size × size 的網格：起點在左上角 (狀態 0)，終點在右下角，撞牆就留在原地。

    狀態由左到右、由上到下編號；動作 0 到 3 是上、下、左、右。
    三個陣列的形狀都是 (狀態, 動作)：走過去是哪個狀態、拿到多少獎勵、是不是終止。
    """

    def __init__(self, size: int, slip: float = 0.0):
        self.slip = slip
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


def alpha_at(visit: int, config: Config) -> float:
    """同一格的第 visit 次更新 (從 1 算) 用的 α：α / n^decay。0.5 < decay ≤ 1 滿足 Watkins 與 Dayan 的收斂條件。"""
    return config.alpha / visit**config.alpha_decay


def td_update(q_table, state, action, reward, next_state, terminated, alpha, gamma) -> float:
    """用一步的經驗更新 Q(S, A)，Sutton 與 Barto 式 (6.8)；回傳 TD 誤差。

    終止之後沒有未來，所以不從終點 bootstrap；步數用完只是時間到了，照樣 bootstrap。
    """
    future = 0.0 if terminated else max(q_table[next_state])
    td_target = reward + gamma * future
    td_error = td_target - q_table[state][action]
    q_table[state][action] += alpha * td_error
    return td_error


def play_episode(q_table, visits, grid: GridWorld, epsilon: float, config: Config, uniform: Iterator[float]):
    """從起點走一個回合，每走一步就學一步；回傳這個回合的回報 (獎勵的總和，不打折) 與步數。

    visits[狀態][動作] 是那一格更新過幾次。
    """
    state, total = 0, 0.0
    for step in range(1, config.max_steps + 1):
        action = select_action(q_table, state, epsilon, uniform)
        next_state, reward, terminated = grid.step(state, action, uniform)
        visits[state][action] += 1
        alpha = alpha_at(visits[state][action], config)
        td_update(q_table, state, action, reward, next_state, terminated, alpha, config.gamma)
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
    visits = np.zeros(grid.reward.shape, int).tolist()
    uniform = uniforms(np.random.default_rng(config.seed))
    returns, env_steps, curve, spread = [], 0, [], {}
    every = max(1, config.episodes // CURVE_POINTS)
    with tqdm(total=config.episodes, desc="訓練", unit="回合", disable=None if progress else True) as bar:
        for episode in range(config.episodes):
            if stop and stop.is_set():
                break
            episode_return, steps = play_episode(q_table, visits, grid, epsilon_at(episode, config), config, uniform)
            returns.append(episode_return)
            env_steps += steps

            done = len(returns)
            if done in SPREAD_EPISODES:
                spread[done] = np.max(q_table, axis=1)
            if done % every == 0 or done == config.episodes:
                block = returns[curve[-1][0] if curve else 0 :]  # 上一個點之後的回合
                curve.append((done, float(np.mean(block)), max_abs_error(q_table, q_star)))
                bar.set_postfix_str(f"平均回報 {curve[-1][1]:.0f}，與 Q* 的最大差距 {curve[-1][2]:.0e}")
                bar.update(done - bar.n)
    seconds, interrupted = time.perf_counter() - start, len(returns) < config.episodes
    return Result(np.array(q_table), q_star, len(returns), env_steps, curve, spread, seconds, interrupted)


# 7. 評估 ---------------------------------------------------------------------------------------------


def evaluate(q_table: np.ndarray, config: Config) -> float:
    """貪婪地 (ε = 0) 從起點走 1,000 個回合的平均回報；滑倒的亂數固定，和隨機種子無關。"""
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


# 8. 主程式 -------------------------------------------------------------------------------------------


def main() -> None:
    config = lesson.parse(Config, "第 1 課：用一張表學會走迷宮，Q-Learning")
    if config.compare:
        return extras.compare(RUN, config, train, evaluate)
    result = train(config, RUN.stop)
    RUN.require_learnt(result.episodes)
    error = max_abs_error(result.q_table, result.q_star)
    greedy_return, optimal_return = evaluate(result.q_table, config), evaluate(result.q_star, config)
    RUN.save_metrics(
        config, result.seconds, max_abs_error=error, greedy_return=greedy_return, optimal_return=optimal_return,
        episodes=result.episodes, env_steps=result.env_steps, curve=result.curve, q_table=result.q_table.tolist(),
        memory_bytes={"parameters": result.q_table.nbytes},
    )  # fmt: skip
    extras.draw(result, config, optimal_return, TARGET_ERROR, epsilon_at)
    print(extras.describe(result.q_table, config.grid_size))
    print(f"貪婪策略從起點走 {EVAL_EPISODES:,} 個回合的平均回報 {greedy_return:.1f}，最佳策略 {optimal_return:.1f}")
    reached = "達標" if error <= TARGET_ERROR else "未達標"
    print(f"{reached}：與 Q* 的最大差距 {error:.1e}（目標 {TARGET_ERROR:.0e}）")
    RUN.finish(config, f"走完 {result.episodes} 個回合" if result.interrupted else "")


if __name__ == "__main__":
    RUN(main)
