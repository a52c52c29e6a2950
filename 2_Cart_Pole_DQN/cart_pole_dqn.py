"""第 2 課：DQN，讓神經網路扮演 Q-Table，把桿子立起來 (模組三)。

問題：狀態是四個連續的數字，列不成表格。把 Q-Table 換成神經網路就好了嗎？為什麼會不穩，怎麼穩住？

    python 2_Cart_Pole_DQN/cart_pole_dqn.py                        訓練 DQN，評估 100 個回合，畫圖
    python 2_Cart_Pole_DQN/cart_pole_dqn.py --no-target-network    拿掉一個穩定器
    python 2_Cart_Pole_DQN/cart_pole_dqn.py --compare              穩定器的四種組合與 Double DQN，各五個隨機種子
    python 2_Cart_Pole_DQN/cart_pole_dqn.py --watch 2_Cart_Pole_DQN/outputs/weights.npz    看訓練好的智慧體

結果在 outputs/：learning_curve.png、q_values.png、agent.gif、weights.npz、metrics.json。

出處：經驗回放：Mnih 等 (2013)，arXiv 1312.5602，演算法 1。目標網路：Mnih 等 (2015)，Nature 518。
Double DQN：van Hasselt 等 (2016)，arXiv 1509.06461，式 (4)。
"""

import time

PROCESS_START = time.perf_counter()  # 在匯入之前記下：回報的總時間從這裡算起

import contextlib
import functools
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import signal
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import gymnasium as gym
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from flax import nnx
from PIL import Image
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EPISODE_STEPS = 500  # CartPole-v1 的時間上限，也是最高的回報
EVAL_EPISODES = 100
TARGET_RETURN = 475.0  # CartPole-v1 登記的及格線
CHECK_SEED, EVAL_SEED = 1_000_000, 2_000_000  # 檢查與評估的起點各用一組，訓練都不使用
CHECK_EVERY = 2_048  # 每隔幾步看一次要不要做貪婪檢查
CHECK_GATE = 150.0  # 最近的訓練回合平均到這裡，才值得檢查
RECENT_EPISODES = 20  # 「最近」是幾個訓練回合
CURVE_EVERY = 1_000  # 學習曲線每隔幾步一個點
COMPARE_SEEDS = 5
COMPARE_STEPS = 40_000

# 1. 超參數 -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """超參數的唯一來源：命令列、README 的表格與測試都讀這裡。"""

    seed: int = 42
    """隨機種子 (seed)"""
    total_steps: int = 100_000
    """與環境互動的步數上限；達到停止條件就提早結束"""
    num_envs: int = 16
    """同時進行的環境份數"""
    buffer_size: int = 50_000
    """回放緩衝區的容量；滿了就蓋掉最舊的"""
    learning_starts: int = 1_000
    """先收集幾步才開始學習"""
    train_every: int = 128
    """每走幾步學習一輪"""
    updates_per_train: int = 64
    """一輪學習更新幾次"""
    batch_size: int = 64
    """每次更新從回放緩衝區抽幾筆"""
    sync_every: int = 1
    """每幾輪學習，把線上網路的權重複製到目標網路"""
    learning_rate: float = 1e-3
    """Adam 的學習率"""
    gamma: float = 0.99
    """折扣因子 γ"""
    epsilon_end: float = 0.05
    """探索率 ε 從 1 線性降到這個值"""
    epsilon_steps: int = 10_000
    """ε 用幾步降完"""
    hidden_size: int = 64
    """隱藏層的寬度"""
    normalize_observations: bool = True
    """把觀測的四個數字縮放到相近的大小"""
    replay: bool = True
    """經驗回放；關掉時，最新的每一步照順序只學一次"""
    target_network: bool = True
    """目標網路；關掉時，線上網路自己算目標"""
    double: bool = False
    """Double DQN：線上網路挑動作，目標網路估它的價值"""
    early_stop: bool = True
    """貪婪檢查的 100 個回合全部滿分就停"""
    compare: bool = False
    """穩定器的四種組合與 Double DQN，各跑種子 0 到 4，畫在一起"""
    watch: Path | None = None
    """載入這個權重檔，看智慧體玩一個回合，不訓練"""
    out_dir: Path = Path(__file__).resolve().parent / "outputs"
    """結果放在哪裡"""


BOUNDS = {  # 每個數值旗標的下限與上限
    "seed": (0, 2**32 - 1),
    "total_steps": (1, math.inf),
    "num_envs": (1, 10_000),
    "buffer_size": (1, 10_000_000),
    "learning_starts": (1, math.inf),
    "train_every": (1, math.inf),
    "updates_per_train": (1, math.inf),
    "batch_size": (1, math.inf),
    "sync_every": (1, math.inf),
    "learning_rate": (0, 1e30),
    "gamma": (0, 0.9999),  # 回合沒有盡頭：γ = 1 時價值是無限大
    "epsilon_end": (0, 1),
    "epsilon_steps": (1, math.inf),
    "hidden_size": (1, 10_000),
}


def check(config: Config) -> None:
    """不合理的值在做任何事之前就拒絕 (結束狀態 2)。"""
    require_bounds(config, BOUNDS)
    require(
        config.watch is None or config.watch.is_file(),
        f"--watch 找不到 {config.watch}",
        "要是訓練留下的 weights.npz",
    )
    total = min(config.total_steps, COMPARE_STEPS) if config.compare else config.total_steps
    require(
        config.learning_starts <= total,
        f"--learning-starts 是 {config.learning_starts}",
        f"總共只走 {total} 步 (total-steps)，要在這以下",
    )
    newest = config.train_every + config.num_envs
    require(
        config.buffer_size >= newest,
        f"--buffer-size 是 {config.buffer_size}",
        f"要放得下一輪學習之間的新資料，{newest} 筆以上 (train-every + num-envs)",
    )
    sampled = config.replay and not config.compare
    require(
        sampled or config.train_every % config.updates_per_train == 0,
        f"--train-every 是 {config.train_every}",
        f"沒有回放時，每一步剛好學一次，要是 updates-per-train ({config.updates_per_train}) 的倍數",
    )
    require(
        sampled or config.learning_starts >= config.train_every,
        f"--learning-starts 是 {config.learning_starts}",
        f"沒有回放時，第一輪就要有 {config.train_every} 步 (train-every)，要在這以上",
    )


# 2. 環境 ---------------------------------------------------------------------------------------------


def make_envs(num_envs: int) -> gym.vector.VectorEnv:
    """num_envs 份 CartPole-v1，用 NumPy 一次走完，並記錄最近幾個回合的回報。

    NEXT_STEP：回合結束後的下一次 step() 只重置那一份環境，動作不起作用，獎勵是 0。那不是真的一步。
    """
    envs = gym.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="vector_entry_point")
    return gym.wrappers.vector.RecordEpisodeStatistics(envs, buffer_length=RECENT_EPISODES)


# 3. 網路 ---------------------------------------------------------------------------------------------


def observation_scale(config: Config) -> tuple[float, float, float, float]:
    """觀測 (位置 m、速度 m/s、角度 rad、角速度 rad/s) 的大小；2.4 m 與 12° (0.2095 rad) 是終止的界線。"""
    return (2.4, 2.0, 0.2095, 2.0) if config.normalize_observations else (1.0, 1.0, 1.0, 1.0)


class QNetwork(nnx.Module):
    """函數近似：觀測 (..., 4) → 每個動作的 Q 值 (..., 2)；動作 0 往左推，1 往右推。"""

    def __init__(self, hidden_size: int, scale: tuple[float, ...], rngs: nnx.Rngs):
        self.scale = scale
        self.layer1 = nnx.Linear(4, hidden_size, rngs=rngs)
        self.layer2 = nnx.Linear(hidden_size, hidden_size, rngs=rngs)
        self.layer3 = nnx.Linear(hidden_size, 2, rngs=rngs)

    def __call__(self, states: jax.Array) -> jax.Array:
        x = nnx.relu(self.layer1(states / jnp.array(self.scale)))
        x = nnx.relu(self.layer2(x))
        return self.layer3(x)


@functools.partial(nnx.jit, static_argnums=(0, 1))
def new_network(hidden_size: int, scale: tuple[float, ...], seed: jax.Array) -> QNetwork:
    """初始化編譯成一次呼叫，比一個一個小運算快一秒。"""
    return QNetwork(hidden_size, scale, nnx.Rngs(jax.random.key(seed)))


# 4. 記憶：異策略的資料，可以重複使用 -----------------------------------------------------------------


class Transition(NamedTuple):
    """經驗 (S, A, R, S')；每個欄位的第一個維度是筆數。終止與截斷不同，這裡只記終止。"""

    state: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_state: np.ndarray
    terminated: np.ndarray


class ReplayBuffer:
    """回放緩衝區：預先配置好的 NumPy 陣列，首尾相接成一個環，滿了就蓋掉最舊的。"""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.added = 0  # 一共存過幾筆
        floats = functools.partial(np.zeros, dtype=np.float32)
        self.data = Transition(
            state=floats((capacity, 4)),
            action=np.zeros(capacity, np.int32),
            reward=floats(capacity),
            next_state=floats((capacity, 4)),
            terminated=floats(capacity),
        )

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, transitions: Transition) -> None:
        """存入幾筆，最多 capacity 筆。"""
        count = len(transitions.action)
        index = (self.added + np.arange(count)) % self.capacity
        for array, values in zip(self.data, transitions, strict=True):
            array[index] = values
        self.added += count

    def sample(self, shape: tuple[int, ...], rng: np.random.Generator) -> Transition:
        """隨機抽樣，可以重複；每個欄位的形狀是 (*shape, …)。"""
        index = rng.integers(len(self), size=shape)
        return Transition(*(array[index] for array in self.data))

    def in_order(self, first: int, shape: tuple[int, ...]) -> Transition:
        """從第 first 筆開始照順序取，不抽樣 (--no-replay)；形狀同 sample。"""
        index = (first + np.arange(math.prod(shape)).reshape(shape)) % self.capacity
        return Transition(*(array[index] for array in self.data))


# 5. 智慧體 -------------------------------------------------------------------------------------------


def epsilon_at(step: int, config: Config) -> float:
    """第 step 步的探索率：從 1 線性降到 epsilon_end，之後不變。"""
    fraction = min(1.0, step / config.epsilon_steps)
    return 1.0 + fraction * (config.epsilon_end - 1.0)


def td_target(rewards, terminated, next_q, gamma):
    """TD 目標 R + γ · max Q(S', a')，arXiv 1312.5602 演算法 1；next_q 的形狀是 (..., 動作)。

    終止 (terminated) 之後沒有未來，不自助；截斷 (truncated) 只是時間到了，照樣自助。
    """
    return rewards + gamma * (1 - terminated) * next_q.max(axis=-1)


def dqn_loss(network: QNetwork, batch: Transition, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """均方誤差 (MSE)：做過的動作的 Q 值與 TD 目標的差；另外回傳這一批最大的 |Q|。"""
    q = network(batch.state)
    chosen = jnp.take_along_axis(q, batch.action[:, None], axis=-1)[:, 0]
    return jnp.mean((targets - chosen) ** 2), jnp.abs(q).max()


@functools.cache
def make_optimizer(learning_rate: float) -> optax.GradientTransformation:
    """同樣的學習率拿到同一個物件，nnx.jit 才不會為每個智慧體重新編譯。"""
    return optax.adam(learning_rate)


@functools.partial(jax.jit, static_argnums=0)
def q_values(structure, weights, states):
    return jax.tree.unflatten(structure, weights)(states)


class DQNAgent(nnx.Module):
    """線上網路、目標網路，以及線上網路的最佳化器。"""

    def __init__(self, config: Config):
        self.gamma = config.gamma
        self.double = config.double
        self.use_target = config.target_network
        scale = observation_scale(config)
        self.online_network = new_network(config.hidden_size, scale, np.uint32(config.seed))
        self.target_network = nnx.clone(self.online_network)
        self.optimizer = nnx.Optimizer(self.online_network, make_optimizer(config.learning_rate), wrt=nnx.Param)

    def freeze(self):
        """線上網路目前權重的快照。模組每次進 jax.jit 都要攤平；一輪只攤平一次。"""
        weights, structure = jax.tree.flatten(self.online_network)
        return structure, weights

    def select_action(self, frozen, states: np.ndarray, epsilon: float, rng: np.random.Generator) -> np.ndarray:
        """ε-貪婪：機率 ε 隨機，否則選 Q 值最大的動作。觀測 (num_envs, 4) → 動作 (num_envs,)。"""
        explore = rng.random(len(states)) < epsilon
        random_actions = rng.integers(2, size=len(states))
        return np.where(explore, random_actions, np.asarray(q_values(*frozen, states)).argmax(axis=-1))

    def train_step(self, batch: Transition) -> tuple[jax.Array, jax.Array]:
        """用一批經驗更新線上網路一次；回傳損失與這一批最大的 |Q|。"""
        target_network = self.target_network if self.use_target else self.online_network
        next_q = target_network(batch.next_state)
        if self.double:  # arXiv 1509.06461 式 (4)：只留下線上網路挑的那個動作
            choice = self.online_network(batch.next_state).argmax(axis=-1, keepdims=True)
            next_q = jnp.take_along_axis(next_q, choice, axis=-1)
        targets = td_target(batch.reward, batch.terminated, next_q, self.gamma)
        # 目標在 dqn_loss 之外算好：梯度不會流進靶心
        (loss, largest_q), grads = nnx.value_and_grad(dqn_loss, has_aux=True)(self.online_network, batch, targets)
        self.optimizer.update(self.online_network, grads)
        return loss, largest_q

    def sync_target_network(self) -> None:
        """移動靶心：把線上網路的權重複製到目標網路。"""
        nnx.update(self.target_network, nnx.state(self.online_network))


@nnx.jit
def learn(agent: DQNAgent, batches: Transition) -> tuple[jax.Array, jax.Array]:
    """一輪學習編譯成一次呼叫。batches 的欄位是 (更新次數, 批次, …)；回傳每次更新的損失與最大的 |Q|。"""

    def step(agent, batch):
        return agent, agent.train_step(batch)

    return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(agent, batches)[1]


# 6. 訓練：收集、檢查、學習、同步 ---------------------------------------------------------------------


@dataclass
class Result:
    agent: DQNAgent
    env_steps: int
    criterion_met: bool  # 貪婪檢查全部滿分；False 是用完了步數，或被 Ctrl-C 打斷
    curve: list[tuple[int, float]]  # (步數, 最近 RECENT_EPISODES 個訓練回合的平均回報)
    checks: list[tuple[int, float]]  # (步數, 貪婪檢查的平均回報)
    largest_q: list[tuple[int, float]]  # (步數, 上一個點以來最大的 |Q|)
    memory_bytes: dict[str, int]  # 訓練時要記住的東西，各佔幾個位元組
    seconds: float
    interrupted: bool  # 被 Ctrl-C 提早結束


def collect(agent, envs, states, resetting, buffer, until, config, rng) -> tuple[np.ndarray, np.ndarray]:
    """用 ε-貪婪走到總共 until 步；回傳下一個觀測 (num_envs, 4)，以及哪幾份環境的下一步只是重置。"""
    frozen = agent.freeze()
    while buffer.added < until:
        actions = agent.select_action(frozen, states, epsilon_at(buffer.added, config), rng)
        next_states, rewards, terminated, truncated, _ = envs.step(actions)
        steps = Transition(states, actions, rewards, next_states, terminated)
        buffer.add(Transition(*(column[~resetting] for column in steps)))  # 重置不是真的一步，不存
        states, resetting = next_states, terminated | truncated
    return states, resetting


def next_batches(buffer: ReplayBuffer, train_at: int, config: Config, rng: np.random.Generator) -> Transition:
    """一輪學習的資料，形狀 (更新次數, 批次, …)；沒有回放時，是第 train_at 步之前的 train_every 步。"""
    updates = config.updates_per_train
    if config.replay:
        return buffer.sample((updates, config.batch_size), rng)
    return buffer.in_order(train_at - config.train_every, (updates, config.train_every // updates))


def array_bytes(tree) -> int:
    """所有陣列一共幾個位元組；純量 (例如最佳化器數步數的那一個) 不算。"""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim)


def memory_bytes(agent: DQNAgent, buffer: ReplayBuffer) -> dict[str, int]:
    """訓練時要記住的東西，各佔幾個位元組。"""
    online, target = (array_bytes(nnx.state(net, nnx.Param)) for net in (agent.online_network, agent.target_network))
    moments = array_bytes(nnx.state(agent.optimizer))
    return {"parameters": online + target, "gradients": online, "moments": moments, "data": array_bytes(buffer.data)}


def train(config: Config, stop: threading.Event | None = None, progress: bool = True) -> Result:
    """照 config 訓練一個智慧體；stop 被設定時，停在兩輪學習之間。

    Raises:
        FloatingPointError: 損失變成 NaN 或無限大。
    """
    start = time.perf_counter()
    rng = np.random.default_rng(config.seed)
    agent, buffer, envs = DQNAgent(config), ReplayBuffer(config.buffer_size), make_envs(config.num_envs)
    states, _ = envs.reset(seed=config.seed)
    resetting = np.zeros(config.num_envs, bool)
    curve, checks, largest_q, recent_q = [], [], [], []
    train_at, check_at, point_at, rounds, criterion_met = config.learning_starts, CHECK_EVERY, CURVE_EVERY, 0, False

    with tqdm(total=config.total_steps, desc="訓練", unit="步", disable=None if progress else True) as bar:
        while buffer.added < config.total_steps and not (stop and stop.is_set()):
            # 收集
            until = min(train_at, config.total_steps)
            states, resetting = collect(agent, envs, states, resetting, buffer, until, config, rng)
            mean_return = float(np.mean(envs.return_queue)) if envs.return_queue else None
            if mean_return is not None:
                bar.set_postfix_str(f"平均回報 {mean_return:.0f}", refresh=not bar.n)
            bar.update(buffer.added - bar.n)
            # 檢查：上一輪學完的網路不探索，玩 100 個訓練與評估都不用的回合
            if config.early_stop and buffer.added >= check_at:
                check_at += CHECK_EVERY * ((buffer.added - check_at) // CHECK_EVERY + 1)
                if mean_return is not None and mean_return >= CHECK_GATE:
                    checks.append((buffer.added, float(evaluate(agent, CHECK_SEED + config.seed)[0].mean())))
                    criterion_met = checks[-1][1] >= EPISODE_STEPS
            # 學習與同步
            if not criterion_met and buffer.added >= train_at:
                losses, q = learn(agent, next_batches(buffer, train_at, config, rng))
                if not np.isfinite(losses).all():
                    raise FloatingPointError(f"第 {buffer.added} 步的損失不是有限的數")
                recent_q.append(float(q.max()))
                train_at += config.train_every
                rounds += 1
                if rounds % config.sync_every == 0:
                    agent.sync_target_network()

            if buffer.added >= point_at or criterion_met:
                if mean_return is not None:
                    curve.append((min(point_at, buffer.added), mean_return))
                if recent_q:
                    largest_q.append((min(point_at, buffer.added), max(recent_q)))
                recent_q.clear()
                point_at += CURVE_EVERY
            if criterion_met:
                break
    envs.close()
    interrupted = not criterion_met and buffer.added < config.total_steps
    seconds, memory = time.perf_counter() - start, memory_bytes(agent, buffer)
    return Result(agent, buffer.added, criterion_met, curve, checks, largest_q, memory, seconds, interrupted)


# 7. 評估 ---------------------------------------------------------------------------------------------


def evaluate(agent: DQNAgent, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """不探索，玩 100 個回合；回傳每個回合的回報，以及起點的 max Q，各 (100,)。"""
    envs = make_envs(EVAL_EPISODES)
    states, _ = envs.reset(seed=seed)
    frozen = agent.freeze()
    start_q = np.asarray(q_values(*frozen, states)).max(axis=-1)
    returns, playing = np.zeros(EVAL_EPISODES), np.ones(EVAL_EPISODES, bool)
    while playing.any():
        states, rewards, terminated, truncated, _ = envs.step(np.asarray(q_values(*frozen, states)).argmax(axis=-1))
        returns += rewards * playing
        playing &= ~(terminated | truncated)  # 每份環境只算第一個回合
    envs.close()
    return returns, start_q


def discounted_return(returns: np.ndarray, gamma: float) -> np.ndarray:
    """每步獎勵是 1 的回合的折扣回報：倒下的是 1 + γ + … + γ^(n-1)；撐到時間上限的當作永遠不倒，1 / (1 - γ)。"""
    return np.where(returns >= EPISODE_STEPS, 1.0, 1 - gamma**returns) / (1 - gamma)


def play(agent: DQNAgent, render_mode: str) -> list[np.ndarray]:
    """不探索，玩一個回合；回傳每四步一張的畫面 (rgb_array)。"""
    if render_mode == "rgb_array":
        os.environ["SDL_VIDEODRIVER"] = "dummy"  # 不開視窗，請 SDL 不要找螢幕
    env = gym.make("CartPole-v1", render_mode=render_mode)
    state, _ = env.reset(seed=0)
    frozen, frames, step, done = agent.freeze(), [], 0, False
    while not done:
        if step % 4 == 0:
            frames.append(env.render())
        state, _, terminated, truncated, _ = env.step(int(np.asarray(q_values(*frozen, state[None])).argmax()))
        step, done = step + 1, terminated or truncated
    frames.append(env.render())
    env.close()
    # 軌道是一條一個像素寬的線，在奇數列；save_gif 隔列取樣，去掉最上面一列才留得住它
    return [frame[1:] for frame in frames if frame is not None]


# 8. 圖 -----------------------------------------------------------------------------------------------


def plot_style() -> None:
    """所有課共用的樣式：白底、色盲也分得清的顏色 (Okabe-Ito)。"""
    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    figure = {"figure.dpi": 110, "figure.facecolor": "white", "figure.constrained_layout.use": True}
    axes = {"axes.prop_cycle": plt.cycler(color=colors), "axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams.update(figure | axes | {"axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False})


def save_figure(figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)


def draw_learning_curve(result: Result, eval_mean: float, config: Config) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    if result.curve:
        axes.plot(*zip(*result.curve, strict=True), label=f"training, mean of last {RECENT_EPISODES} episodes")
    if result.checks:
        axes.plot(*zip(*result.checks, strict=True), "o", color="C1", label=f"greedy check, {EVAL_EPISODES} episodes")
    axes.axhline(eval_mean, color="C2", linestyle="--", label=f"final evaluation, greedy: {eval_mean:.1f}")
    axes.axhline(TARGET_RETURN, color="0.4", linestyle=":", label=f"target: {TARGET_RETURN:.0f}")
    axes.set(xlabel="environment steps", ylabel="mean return", title="DQN on CartPole-v1", ylim=(0, 520))
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0.9))
    save_figure(figure, config.out_dir / "learning_curve.png")


def draw_q_values(agent: DQNAgent, config: Config) -> None:
    """小車靜止在中央，桿子的角度與角速度各換 81 個值：左圖 max Q，右圖兩個動作的 Q 值差。"""
    angles, speeds = np.linspace(-12, 12, 81), np.linspace(-2, 2, 81)
    grid = np.stack(np.meshgrid(np.radians(angles), speeds), axis=-1).reshape(-1, 2)
    states = np.concatenate([np.zeros_like(grid), grid], axis=1).astype(np.float32)
    q = np.asarray(q_values(*agent.freeze(), states)).reshape(81, 81, 2)
    difference = q[..., 1] - q[..., 0]
    limit = float(np.abs(difference).max()) or 1.0
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
    values = left.pcolormesh(angles, speeds, q.max(axis=-1), cmap="viridis", rasterized=True)
    figure.colorbar(values, ax=left, label="max Q (discounted return)")
    gaps = right.pcolormesh(angles, speeds, difference, cmap="PuOr", vmin=-limit, vmax=limit, rasterized=True)
    figure.colorbar(gaps, ax=right, label="Q(push right) − Q(push left)")
    left.set_title("how good is the state: max Q")
    right.set_title("which action is better")
    for axes in (left, right):
        axes.set(xlabel="pole angle (degrees, + = leaning right)", ylabel="pole angular velocity (rad/s)")
        axes.grid(visible=False)
    if difference.min() < 0 < difference.max():
        right.contour(angles, speeds, difference, levels=[0], colors="black", linewidths=1.5)
    for label, region in (("push right", difference > 0), ("push left", difference < 0)):
        if region.mean() > 0.05:
            rows, columns = np.nonzero(region)
            box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none"}
            right.text(angles[columns].mean(), speeds[rows].mean(), label, ha="center", va="center", bbox=box)
    save_figure(figure, config.out_dir / "q_values.png")


def save_gif(frames: list[np.ndarray], path: Path) -> None:
    """寬高各縮一半，存成 GIF，一張 60 毫秒。"""
    images = [Image.fromarray(frame[::2, ::2]).quantize(32) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=60, loop=0)


# 9. 比較 ---------------------------------------------------------------------------------------------


VARIANTS = {  # 名稱 (圖例與表格) → 與預設值不同的旗標
    "replay + target": {},
    "no replay": {"replay": False},
    "no target": {"target_network": False},
    "neither": {"replay": False, "target_network": False},
    "double": {"double": True},
}


def compare(config: Config, stop: threading.Event) -> dict:
    """VARIANTS 的每一種各跑 COMPARE_SEEDS 個隨機種子，走一樣多步、不提早停；回傳每一種的曲線與數字。"""
    config = replace(config, total_steps=min(config.total_steps, COMPARE_STEPS), early_stop=False)
    columns = ("curves", "largest_q", "eval_means", "start_q", "true_returns")
    rows = {name: {column: [] for column in columns} | {"gamma": config.gamma} for name in VARIANTS}
    runs = [(seed, name) for seed in range(COMPARE_SEEDS) for name in VARIANTS]
    for seed, name in tqdm(runs, desc="比較", unit="次訓練"):
        result = train(replace(config, seed=seed, **VARIANTS[name]), stop, progress=False)
        if result.interrupted:
            break
        returns, start_q = evaluate(result.agent, EVAL_SEED + seed)
        rows[name]["curves"].append([list(point) for point in result.curve])
        rows[name]["largest_q"].append([list(point) for point in result.largest_q])
        rows[name]["eval_means"].append(float(returns.mean()))
        rows[name]["start_q"].append(float(start_q.mean()))
        rows[name]["true_returns"].append(float(discounted_return(returns, config.gamma).mean()))
    return {name: row for name, row in rows.items() if row["eval_means"]}


def comparison_table(rows: dict) -> str:
    """Markdown 表格；高估是起點的 max Q 減去同一批回合真正的折扣回報。"""
    header = ["組合", "訓練期間的平均回報", "最後的貪婪策略：平均", "最差的種子", "最大的 \\|Q\\|：中位數", "最大值"]
    header += ["起點的 max Q", "真正的折扣回報", "高估"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for name, row in rows.items():
        training = np.mean([value for curve in row["curves"] for _, value in curve] or [math.nan])
        largest = [max((value for _, value in curve), default=math.nan) for curve in row["largest_q"]]
        start_q, true_return = np.mean(row["start_q"]), np.mean(row["true_returns"])
        cells = [f"`{name}`", f"{training:.1f}", f"{np.mean(row['eval_means']):.1f}", f"{min(row['eval_means']):.1f}"]
        cells += [f"{np.median(largest):.0f}", f"{max(largest):.0f}"]
        cells += [f"{start_q:.1f}", f"{true_return:.1f}", f"{start_q - true_return:+.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shared_points(curves: list) -> list:
    """只留下每條曲線都有的步數。"""
    steps = set.intersection(*({step for step, _ in curve} for curve in curves))
    return [[point for point in curve if point[0] in steps] for curve in curves]


def draw_curves(axes, label: str, curves: list, color: str) -> None:
    """各個隨機種子的平均，加上最差到最好的色帶。"""
    steps, values = np.array(curves[0])[:, 0], np.array(curves)[:, :, 1]
    axes.plot(steps, values.mean(axis=0), label=label, color=color)
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, lw=0)
    axes.set(xlabel="environment steps", ylabel="mean return of training episodes")


def draw_comparison(rows: dict, out_dir: Path) -> None:
    """comparison.png：左邊學習曲線，右邊最大的 |Q|；穩定器的四種組合。"""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6))
    for i, name in enumerate(name for name in VARIANTS if name in rows and name != "double"):
        for axes, column in ((left, "curves"), (right, "largest_q")):
            curves = shared_points(rows[name][column])
            if curves[0]:
                draw_curves(axes, name, curves, f"C{i}")
    bound = 1 / (1 - next(iter(rows.values()))["gamma"])
    right.axhline(bound, color="black", linestyle="--", label=f"1 / (1 − γ) = {bound:.0f}: no true value is larger")
    right.set(yscale="log", ylabel="largest |Q| in training")
    seeds = max(len(row["curves"]) for row in rows.values())
    left.set_title(f"CartPole-v1: mean and range over {seeds} seeds")
    right.set_title("does Q run away?")
    left.legend(loc="upper left", fontsize=9)
    right.legend(loc="lower right", fontsize=9)
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


def has_display() -> bool:
    return sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())


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


def save_weights(module: nnx.Module, path: Path) -> None:
    """權重存成 .npz，一個陣列一個名字，例如 actor/mu/kernel；不用 pickle。"""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    np.savez(path, **{"/".join(name): np.asarray(param[...]) for name, param in flat})


def load_weights(module: nnx.Module, path: Path) -> None:
    """把 save_weights 的檔案讀回 module；檔案不對就以狀態 2 結束。"""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name, param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
                array = arrays["/".join(name)]
                if array.shape != param.shape:
                    raise ValueError(f"{'/'.join(name)} 的形狀是 {array.shape}，這裡要 {param.shape}")
                param[...] = jnp.asarray(array)
    except (OSError, ValueError, KeyError) as error:
        fail(f"--watch {path} 讀不出這一課的權重 ({error})；要是同樣的旗標訓練出來的 weights.npz", status=2)


def watch(play, agent, config) -> None:
    """載入 config.watch 的權重，在視窗裡玩一個回合；沒有螢幕就寫成 GIF。"""
    load_weights(agent, config.watch)
    if has_display():
        play(agent, "human")
    else:
        save_gif(play(agent, "rgb_array"), config.out_dir / "agent.gif")
        print(f"沒有螢幕，畫面存在 {config.out_dir / 'agent.gif'}")


def finish(config, interrupted: bool, progress: str) -> None:
    """最後一行：結果在哪裡；被中斷時結束狀態是 130。"""
    if interrupted:
        print(f"已中斷：{progress}，目前的結果存在 {config.out_dir}")
        sys.exit(130)
    print(f"結果存在 {config.out_dir}")


def main() -> None:
    config = parse_config(Config, "第 2 課：DQN，讓神經網路扮演 Q-Table，把桿子立起來")
    check(config)
    prepare_out_dir(config.out_dir)
    stop = stop_on_ctrl_c()
    plot_style()
    device = {"platform": jax.default_backend(), "count": jax.device_count()}
    if config.watch:
        return watch(play, DQNAgent(config), config)
    if config.compare:
        rows = compare(config, stop)
        table = comparison_table(rows)
        if rows:
            draw_comparison(rows, config.out_dir)
        (config.out_dir / "comparison.md").write_text(table, encoding="utf-8")
        save_metrics(config, time.perf_counter() - PROCESS_START, device, comparison=rows)
        print(table)
        return finish(config, stop.is_set(), f"完成 {sum(len(row['eval_means']) for row in rows.values())} 次訓練")

    result = train(config, stop)
    eval_returns, _ = evaluate(result.agent, EVAL_SEED + config.seed)
    eval_mean = float(eval_returns.mean())
    solved = eval_mean >= TARGET_RETURN
    draw_learning_curve(result, eval_mean, config)
    draw_q_values(result.agent, config)
    save_gif(play(result.agent, "rgb_array"), config.out_dir / "agent.gif")
    save_weights(result.agent, config.out_dir / "weights.npz")
    results = {"env_steps": result.env_steps, "eval_returns": eval_returns.tolist(), "eval_mean": eval_mean}
    results |= {"solved": solved, "criterion_met": result.criterion_met, "curve": result.curve}
    results |= {"checks": result.checks, "largest_q": result.largest_q, "memory_bytes": result.memory_bytes}
    save_metrics(config, result.seconds, device, **results)
    if result.criterion_met:
        print(f"達到停止條件：第 {result.env_steps} 步的貪婪檢查，{EVAL_EPISODES} 個回合全部滿分")
    elif not result.interrupted:
        print(f"用完步數的預算：走了 {result.env_steps} 步")
    figure = f"{EVAL_EPISODES} 個評估回合的平均回報 {eval_mean:.1f}"
    print(f"{'達標' if solved else '未達標'}：{figure}（目標 {TARGET_RETURN:.1f}）")
    finish(config, result.interrupted, f"走了 {result.env_steps} 步")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except FloatingPointError as error:
        fail(f"{error}；把學習率調小再試", status=1)
