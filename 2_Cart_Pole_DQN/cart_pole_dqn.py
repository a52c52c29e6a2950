"""第 2 課：DQN，讓神經網路扮演 Q-Table，把桿子立起來 (模組三)。

問題：狀態是四個連續的數字，列不成表格。把 Q-Table 換成神經網路就好了嗎？為什麼會不穩，怎麼穩住？

    python 2_Cart_Pole_DQN/cart_pole_dqn.py                        訓練 DQN，評估 100 個回合，畫圖
    python 2_Cart_Pole_DQN/cart_pole_dqn.py --no-target-network    拿掉一個穩定器
    python 2_Cart_Pole_DQN/cart_pole_dqn.py --compare              穩定器的四種組合、Double DQN 與分格的表，各十個種子
    python 2_Cart_Pole_DQN/cart_pole_dqn.py --watch 2_Cart_Pole_DQN/outputs/weights.npz    看訓練好的智慧體

結果在 outputs/：learning_curve.png、q_values.png、agent.gif、weights.npz、metrics.json。

出處：經驗回放：Mnih 等 (2013)，arXiv 1312.5602，演算法 1。目標網路：Mnih 等 (2015)，Nature 518。
Double DQN：van Hasselt 等 (2016)，arXiv 1509.06461，式 (4)。
"""

import lesson

RUN = lesson.Run(__name__, __file__)  # 從這裡開始計時，Ctrl-C 也從這裡開始有人接

import functools
import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import cart_pole_dqn_extras as extras
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from snapshot import snapshot
from tqdm import tqdm

from lesson_extras import save_weights, watch

EPISODE_STEPS = extras.EPISODE_STEPS  # CartPole-v1 的時間上限 500，也是最高的回報
EVAL_EPISODES = 100
TARGET_RETURN = 475.0  # CartPole-v1 登記的及格線
CHECK_SEED, EVAL_SEED = 1_000_000, 2_000_000  # 檢查與評估的起點各用一組，訓練都不使用
CHECK_EVERY = 2_048  # 每隔幾步看一次要不要做貪婪檢查
CHECK_GATE = 150.0  # 最近的訓練回合平均到這裡，才值得檢查
RECENT_EPISODES = 20  # 「最近」是幾個訓練回合；環境比這還多份時，和環境一樣多
CURVE_EVERY = 1_000  # 學習曲線每隔幾步一個點
# 觀測的四個數字 (位置 m、速度 m/s、角度 rad、角速度 rad/s) 的大小；2.4 m 與 12° (0.2095 rad) 是終止的界線
OBSERVATION_SCALE = (2.4, 2.0, 0.2095, 2.0)

# 1. 超參數 -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """超參數的唯一來源：命令列、README 的表格與測試都讀這裡。"""

    seed: Annotated[int, (0, 2**32 - 1)] = 42  # 隨機種子 (seed)
    total_steps: Annotated[int, (1, 10**9)] = 100_000  # 與環境互動幾步 (最多再多 num_envs - 1 步)；達到停止條件就提早停
    num_envs: Annotated[int, (1, 10**4)] = 16  # 同時進行的環境份數
    buffer_size: Annotated[int, (1, 10**7)] = 50_000  # 回放緩衝區的容量；滿了就蓋掉最舊的
    learning_starts: Annotated[int, (1, 10**9)] = 1_000  # 先收集幾步才開始學習
    train_every: Annotated[int, (1, 10**7)] = 128  # 每走幾步進入一次學習階段
    updates_per_train: Annotated[int, (1, 10**6)] = 64  # 一個學習階段更新幾次
    batch_size: Annotated[int, (1, 10**6)] = 64  # 每次更新從回放緩衝區抽幾筆
    sync_every: Annotated[int, (1, 10**6)] = 1  # 每幾個學習階段，把線上網路的權重複製到目標網路
    learning_rate: Annotated[float, (1e-7, 1e30)] = 1e-3  # Adam 的學習率
    gamma: Annotated[float, (0, 0.9999)] = 0.99  # 折扣因子 γ
    epsilon_end: Annotated[float, (0, 1)] = 0.05  # 探索率 ε 從 1 線性降到這個值
    epsilon_steps: Annotated[int, (1, 10**9)] = 10_000  # ε 用幾步降完
    hidden_size: Annotated[int, (1, 10**4)] = 64  # 隱藏層的寬度
    normalize_observations: bool = True  # 把觀測的四個數字縮放到相近的大小
    replay: bool = True  # 經驗回放；關掉時，最新的每一步照順序只學一次
    target_network: bool = True  # 目標網路；關掉時，線上網路自己算目標
    double: bool = False  # Double DQN：線上網路挑動作，目標網路估它的價值
    early_stop: bool = True  # 貪婪檢查的 100 個回合全部滿分就停
    compare: bool = False  # 穩定器的四種組合、Double DQN 與分格的表，各跑十個隨機種子，畫在一起
    watch: Path | None = None  # 載入這個權重檔，看智慧體玩一個回合，不訓練
    out_dir: Path = Path(__file__).resolve().parent / "outputs"  # 結果放在哪裡

    def __post_init__(self):
        lesson.check_bounds(self)
        extras.check(self)  # 記憶體放不放得下；--compare 要跑的每一種設定
        starts, every, newest = self.learning_starts, self.train_every, self.train_every + self.num_envs
        if starts > self.total_steps:
            raise ValueError(f"--learning-starts 是 {starts}；總共只走 {self.total_steps} 步，要在這以下")
        if self.double and not self.target_network:
            raise ValueError("--double 配上 --no-target-network；沒有第二張網路，兩者的目標相同，拿掉其中一個")
        if self.buffer_size < newest:
            right = f"要放得下一個學習階段的新資料，{newest} 筆以上 (train-every + num-envs)"
            raise ValueError(f"--buffer-size 是 {self.buffer_size}；{right}")
        if not self.replay and every % self.updates_per_train:
            right = f"沒有回放時每一步剛好學一次，要是 updates-per-train ({self.updates_per_train}) 的倍數"
            raise ValueError(f"--train-every 是 {every}；{right}")
        if not self.replay and starts < every:
            right = f"沒有回放時，第一個學習階段就要有 {every} 步 (train-every)，要在這以上"
            raise ValueError(f"--learning-starts 是 {starts}；{right}")


# 2. 環境 ---------------------------------------------------------------------------------------------


def make_envs(num_envs: int) -> gym.vector.VectorEnv:
    """num_envs 份 CartPole-v1，用 NumPy 一次走完；起點都從同一個亂數產生器抽，彼此獨立。

    NEXT_STEP：回合結束後的下一次 step() 只重置那一份環境，動作不起作用，獎勵是 0。那不是真的一步。
    """
    return gym.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="vector_entry_point")


# 3. 網路 ---------------------------------------------------------------------------------------------


class QNetwork(nnx.Module):
    """函數近似：觀測 (..., 4) → 每個動作的 Q 值 (..., 2)；動作 0 往左推，1 往右推。"""

    def __init__(self, hidden_size: int, scale: tuple[float, ...], rngs: nnx.Rngs):
        self.scale = scale
        self.fc1 = nnx.Linear(4, hidden_size, rngs=rngs)
        self.fc2 = nnx.Linear(hidden_size, hidden_size, rngs=rngs)
        self.fc_out = nnx.Linear(hidden_size, 2, rngs=rngs)

    def __call__(self, states: jax.Array) -> jax.Array:
        x = nnx.relu(self.fc1(states / jnp.array(self.scale)))
        x = nnx.relu(self.fc2(x))
        return self.fc_out(x)


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
        states, next_states, actions = floats((capacity, 4)), floats((capacity, 4)), np.zeros(capacity, np.int32)
        self.data = Transition(states, actions, floats(capacity), next_states, floats(capacity))

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


def td_target(rewards, terminated, next_q, gamma):
    """TD 目標 R + γ · max Q(S', a')，arXiv 1312.5602 演算法 1；next_q 的形狀是 (..., 動作)。

    終止 (terminated) 之後沒有未來，不 bootstrap；截斷 (truncated) 只是時間到了，照樣 bootstrap。
    """
    return rewards + gamma * (1 - terminated) * next_q.max(axis=-1)


def dqn_loss(network: QNetwork, batch: Transition, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """均方誤差 (MSE)：做過的動作的 Q 值與 TD 目標的差；另外回傳這一批最大的 |Q|。"""
    q = network(batch.state)
    chosen = jnp.take_along_axis(q, batch.action[:, None], axis=-1)[:, 0]
    return jnp.mean((targets - chosen) ** 2), jnp.abs(q).max()


make_adam = functools.cache(optax.adam)  # 同樣的學習率拿到同一個物件，jax.jit 才不會為每個智慧體重新編譯


@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options={"xla_backend_optimization_level": 1})
def make_networks(hidden_size: int, scale: tuple[float, ...], adam: optax.GradientTransformation, seed: jax.Array):
    """線上網路、一模一樣的目標網路、線上網路的最佳化器；編譯成一次呼叫。它只執行一次，編譯得快比跑得快重要。"""
    online_network = QNetwork(hidden_size, scale, nnx.Rngs(jax.random.key(seed)))
    return online_network, nnx.clone(online_network), nnx.Optimizer(online_network, adam, wrt=nnx.Param)


class DQNAgent(nnx.Module):
    """線上網路、目標網路，以及線上網路的最佳化器。"""

    def __init__(self, config: Config):
        self.gamma = config.gamma
        self.double = config.double
        self.use_target = config.target_network
        scale = OBSERVATION_SCALE if config.normalize_observations else (1.0, 1.0, 1.0, 1.0)
        parts = make_networks(config.hidden_size, scale, make_adam(config.learning_rate), np.uint32(config.seed))
        self.online_network, self.target_network, self.optimizer = parts

    def q_function(self):
        """線上網路這一刻的 Q 函數：觀測 (..., 4) → Q 值 (..., 2)。"""
        return snapshot(QNetwork.__call__, self.online_network)

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
@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
def learn(agent: DQNAgent, batch: Transition):
    """一個學習階段編譯成一次呼叫：欄位 (更新次數, 批次, …) → (智慧體, (每次更新的損失, 最大的 |Q|))。"""
    return agent, agent.train_step(batch)


def epsilon_at(step: int, config: Config) -> float:
    """第 step 步的探索率：從 1 線性降到 epsilon_end，之後不變。"""
    fraction = min(1.0, step / config.epsilon_steps)
    return 1.0 + fraction * (config.epsilon_end - 1.0)


def select_action(q_function, states: np.ndarray, epsilon: float, rng: np.random.Generator) -> np.ndarray:
    """ε-貪婪：機率 ε 隨機，否則選 Q 值最大的動作。觀測 (num_envs, 4) → 動作 (num_envs,)。"""
    explore = rng.random(len(states)) < epsilon
    random_actions = rng.integers(2, size=len(states))
    return np.where(explore, random_actions, np.asarray(q_function(states)).argmax(axis=-1))


# 6. 訓練：收集、檢查、學習、同步 ---------------------------------------------------------------------


class Collector:
    """一邊走一邊存：環境、現在的觀測 (num_envs, 4)、哪幾份的下一步只是重置、最近幾個回合的回報。"""

    def __init__(self, config: Config, rng: np.random.Generator):
        self.config = config
        self.rng = rng
        recent = max(RECENT_EPISODES, config.num_envs)  # 同時開始的許多份，先走完的都是短的回合
        self.envs = gym.wrappers.vector.RecordEpisodeStatistics(make_envs(config.num_envs), recent)
        self.states, _ = self.envs.reset(seed=config.seed)
        self.resetting = np.zeros(config.num_envs, bool)

    def collect(self, agent: DQNAgent, buffer: ReplayBuffer, until: int) -> float:
        """用 ε-貪婪走到緩衝區一共存過 until 步；回傳最近幾個回合的平均回報，走完的比環境還少時是 nan。"""
        q_function = agent.q_function()
        while buffer.added < until:
            epsilon = epsilon_at(buffer.added, self.config)
            actions = select_action(q_function, self.states, epsilon, self.rng)
            next_states, rewards, terminated, truncated, _ = self.envs.step(actions)
            steps = Transition(self.states, actions, rewards, next_states, terminated)
            buffer.add(Transition(*(column[~self.resetting] for column in steps)))  # 重置不是真的一步，不存
            self.states, self.resetting = next_states, terminated | truncated
        recent = self.envs.return_queue
        return float(np.mean(recent)) if len(recent) >= self.config.num_envs else math.nan


def next_batches(buffer: ReplayBuffer, due: int, config: Config, rng: np.random.Generator) -> Transition:
    """一個學習階段的資料，形狀 (更新次數, 批次, …)；沒有回放時，是第 due 步之前的 train_every 步。"""
    updates = config.updates_per_train
    if config.replay:
        return buffer.sample((updates, config.batch_size), rng)
    return buffer.in_order(due - config.train_every, (updates, config.train_every // updates))


@dataclass
class Result:
    agent: DQNAgent
    history: extras.History  # 學習曲線、貪婪檢查、最大的 |Q|
    env_steps: int
    rounds: int  # 學了幾個階段
    criterion_met: bool  # 貪婪檢查全部滿分；False 是用完了步數，或被 Ctrl-C 打斷
    memory_bytes: dict[str, int]  # 訓練時要記住的東西，各佔幾個位元組
    seconds: float
    interrupted: bool  # 被 Ctrl-C 提早結束


def train(config: Config, stop: threading.Event | None = None, progress: bool = True) -> Result:
    """照 config 訓練一個智慧體；stop 被設定時，停在兩個學習階段之間。損失變成 NaN 或無限大就丟出 LessonError。"""
    start = time.perf_counter()
    # 探索與抽樣用另一支亂數：只給種子，和環境的起點就是同一串數字
    rng = np.random.default_rng([config.seed, 1])
    agent = DQNAgent(config)
    buffer = ReplayBuffer(config.buffer_size)
    collector = Collector(config, rng)
    history = extras.History(CURVE_EVERY)
    step, rounds, perfect = 0, 0, False
    learn_round = nnx.cached_partial(learn, agent)  # 智慧體只攤平一次，不是每個階段都攤平
    with tqdm(total=config.total_steps, desc="訓練", unit="步", disable=None if progress else True) as bar:
        while step < config.total_steps and not perfect and not (stop and stop.is_set()):
            # 收集：走到該學習的那一步
            before, due = step, config.learning_starts + rounds * config.train_every
            mean_return = collector.collect(agent, buffer, min(due, config.total_steps))
            step = buffer.added
            if not math.isnan(mean_return):
                bar.set_postfix_str(f"平均回報 {mean_return:.0f}", refresh=not history.curve)
            bar.update(min(step, config.total_steps) - bar.n)
            # 檢查：上一個學習階段學完的網路不探索，玩 100 個訓練與評估都不用的回合
            check_due = step // CHECK_EVERY > before // CHECK_EVERY  # 走過了 CHECK_EVERY 的倍數
            if config.early_stop and check_due and mean_return >= CHECK_GATE:
                returns, _ = evaluate(agent, CHECK_SEED + config.seed)
                history.checks.append((step, float(returns.mean())))
                perfect = bool(returns.mean() >= EPISODE_STEPS)
            # 學習
            if step >= due and not perfect:
                _, (losses, largest_q) = learn_round(next_batches(buffer, due, config, rng))
                if not np.isfinite(losses).all():
                    raise lesson.LessonError(f"第 {step} 步的損失不是有限的數；把學習率調小再試", 1)
                history.add_round(largest_q)
                rounds += 1
                # 同步
                if rounds % config.sync_every == 0:
                    agent.sync_target_network()
            history.add_point(step, mean_return, last=perfect or step >= config.total_steps)
    collector.envs.close()
    seconds, memory_bytes = time.perf_counter() - start, extras.memory_bytes(agent, buffer)
    interrupted = step < config.total_steps and not perfect
    return Result(agent, history, step, rounds, perfect, memory_bytes, seconds, interrupted)


# 7. 評估 ---------------------------------------------------------------------------------------------


def evaluate(agent: DQNAgent, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """不探索，玩 100 個回合；回傳每個回合的回報，以及起點的 max Q，各 (100,)。"""
    envs, q_function = make_envs(EVAL_EPISODES), agent.q_function()
    states, _ = envs.reset(seed=seed)
    start_q = np.asarray(q_function(states)).max(axis=-1)
    returns, playing = np.zeros(EVAL_EPISODES), np.ones(EVAL_EPISODES, bool)
    while playing.any():
        states, rewards, terminated, truncated, _ = envs.step(np.asarray(q_function(states)).argmax(axis=-1))
        returns += rewards * playing
        playing &= ~(terminated | truncated)  # 每份環境只算第一個回合
    envs.close()
    return returns, start_q


# 8. 主程式 -------------------------------------------------------------------------------------------


def main() -> None:
    config = lesson.parse(Config, "第 2 課：DQN，讓神經網路扮演 Q-Table，把桿子立起來")
    lesson.find_devices()
    if config.watch:
        return watch(RUN, extras.play, DQNAgent(config), config, extras.FRAME_MILLISECONDS)
    if config.compare:
        return extras.compare(RUN, config, train, evaluate, EVAL_SEED, (ReplayBuffer, Collector, next_batches))
    result = train(config, RUN.stop)
    RUN.require_learnt(result.rounds)
    returns, _ = evaluate(result.agent, EVAL_SEED + config.seed)
    eval_mean = float(returns.mean())
    solved = eval_mean >= TARGET_RETURN
    save_weights(config.out_dir / "weights.npz", result.agent)
    RUN.save_metrics(
        config, result.seconds, env_steps=result.env_steps, eval_returns=returns.tolist(), eval_mean=eval_mean,
        solved=solved, criterion_met=result.criterion_met, memory_bytes=result.memory_bytes,
        curve=result.history.curve, checks=result.history.checks, largest_q=result.history.largest_q,
    )  # fmt: skip
    extras.draw(result, config, returns, TARGET_RETURN, max(RECENT_EPISODES, config.num_envs))
    if result.criterion_met:
        print(f"達到停止條件：第 {result.env_steps} 步的貪婪檢查，{EVAL_EPISODES} 個回合全部滿分")
    elif not result.interrupted:
        print(f"用完步數的預算：走了 {result.env_steps} 步")
    reached = "達標" if solved else "未達標"
    print(f"{reached}：{EVAL_EPISODES} 個評估回合的平均回報 {eval_mean:.1f}（目標 {TARGET_RETURN:.1f}）")
    RUN.finish(config, f"走了 {result.env_steps} 步" if result.interrupted else "")


if __name__ == "__main__":
    RUN(main)
