"""第 3 課：從 REINFORCE 到 PPO，把單擺甩上去 (模組四、五)。

問題：力矩是連續的，沒辦法對它取 max Q。能不能直接學策略？光靠「分數高就多做」為什麼學不起來？

    python 3_Pendulum/pendulum.py                          訓練 PPO-Clip，評估 100 個回合，畫圖
    python 3_Pendulum/pendulum.py --algorithm reinforce    換成階梯上的另一階
    python 3_Pendulum/pendulum.py --compare                九種演算法與筆記的設定，各跑十個隨機種子
    python 3_Pendulum/pendulum.py --watch 3_Pendulum/outputs/weights.npz    看訓練好的智慧體

結果在 outputs/：learning_curve.png、clipped_objective.png、agent.gif、weights.npz、metrics.json。

出處：REINFORCE：Williams (1992)。GAE：Schulman 等 (2016)，arXiv 1506.02438，式 (11)、(16)。
PPO：Schulman 等 (2017)，arXiv 1707.06347，式 (7) 比例裁剪、式 (8) KL 懲罰。
"""

import lesson

RUN = lesson.Run(__name__, __file__)  # 從這裡開始計時，Ctrl-C 也從這裡開始有人接

import functools
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pendulum_extras as extras
from flax import nnx
from pendulum_envs import EPISODE_STEPS, PendulumEnvs, evaluation_starts
from snapshot import snapshot
from tensorflow_probability.substrates.jax import distributions as tfd
from tqdm import tqdm

from lesson_extras import save_weights, watch

TARGET_RETURN = -175.0
MIN_SIGMA = 1e-3

# 1. 超參數 -------------------------------------------------------------------------------------------

# 階梯的一階有三個開關，每一階只比前一階多一個想法；bad_baseline 是岔路，最後兩階是兩種鎖，並列：
#   score        每個動作的分數：整個回合的總分、只算之後的獎勵、減掉平均、減掉評論家的 V(s)、用 λ 混合 (GAE)
#   reuse、lock  同一批資料學 train_epochs 遍，而不是一遍；限制步伐的安全鎖："none"、"clip" 或 "kl"
Rung = namedtuple("Rung", "score reuse lock", defaults=(False, "none"))
ALGORITHMS = {
    "reinforce": Rung("return"),
    "reward_to_go": Rung("to_go"),
    "bad_baseline": Rung("bad_mean"),
    "mean_baseline": Rung("mean"),
    "reinforce_baseline": Rung("value"),
    "actor_critic": Rung("gae"),
    "ppo_unclipped": Rung("gae", reuse=True),
    "ppo_clip": Rung("gae", reuse=True, lock="clip"),
    "ppo_kl": Rung("gae", reuse=True, lock="kl"),
}


@dataclass(frozen=True)
class Config:
    """超參數的唯一來源：命令列、README 的表格與測試都讀這裡。"""

    algorithm: Literal[*ALGORITHMS] = "ppo_clip"  # 演算法：階梯上的哪一階
    seed: Annotated[int, (0, 2**32 - 1)] = 42  # 隨機種子 (seed)
    total_steps: Annotated[int, (1, 10**9)] = 100_000  # 與環境互動的總步數；剩下不足一次收集的不走
    num_envs: Annotated[int, (1, 10**4)] = 16  # 同時進行的環境份數
    num_steps: Annotated[int, (1, 10**6)] = 200  # 一次收集 (rollout) 裡，每個環境走幾步
    train_epochs: Annotated[int, (1, 10**4)] = 10  # 同一批資料學幾遍 (K)
    minibatch_size: Annotated[int, (1, 10**7)] = 128  # 小批次 (minibatch) 的樣本數；每一遍剩下不足一個的不用
    actor_learning_rate: Annotated[float, (1e-7, 1)] = 2e-3  # 演員的學習率
    critic_learning_rate: Annotated[float, (1e-7, 1)] = 2e-3  # 評論家的學習率
    anneal_learning_rate: bool = True  # 學習率線性降到 0
    max_grad_norm: Annotated[float, (1e-6, 1e9)] = 0.5  # 梯度範數的上限；1e9 等於不做梯度裁剪
    gamma: Annotated[float, (0, 1)] = 0.99  # 折扣因子 γ
    gae_lambda: Annotated[float, (0, 1)] = 0.95  # GAE 的 λ：0 全靠評論家，1 全靠實際回報
    clip_epsilon: Annotated[float, (1e-6, 1)] = 0.2  # PPO-Clip 的 ε：比例的界線是 1 - ε 與 1 + ε
    beta: Annotated[float, (0, 1e6)] = 1.0  # PPO-KL 的 β：KL 散度懲罰的權重
    normalize_advantages: bool = True  # 在每個小批次裡把優勢標準化 (減了基線的演算法)
    normalize_observations: bool = True  # 把觀測縮放到 [-1, 1]
    reward_scale: Annotated[float, (1e-6, 1e6)] = 0.1  # 學習時獎勵乘上的倍率；回報的數字不受影響
    sigma_bias: Annotated[float, (-10, 10)] = 1.0  # sigma 輸出層的初始偏置：1 讓 σ 從 softplus(1) = 1.31 開始
    hidden_size: Annotated[int, (1, 4096)] = 64  # 隱藏層的寬度
    compare: bool = False  # 九種演算法與筆記的設定，各跑十個隨機種子，畫在一起
    watch: Path | None = None  # 載入這個權重檔，看智慧體玩一個回合，不訓練
    out_dir: Path = Path(__file__).resolve().parent / "outputs"  # 結果放在哪裡

    def __post_init__(self):
        lesson.check_bounds(self)
        extras.check(self, ALGORITHMS)  # 幾個欄位合起來要滿足的事

    rung = property(lambda self: ALGORITHMS[self.algorithm])
    critic = property(lambda self: self.rung.score in ("value", "gae"))  # 用不用評論家
    standardizes = property(lambda self: self.normalize_advantages and self.rung.score in ("mean", "value", "gae"))
    rollout_size = property(lambda self: self.num_envs * self.num_steps)  # 一次收集的總步數
    epochs = property(lambda self: self.train_epochs if self.rung.reuse else 1)  # 同一批資料實際學幾遍

    @property
    def updates(self) -> int:  # 整個訓練更新幾次；不足一次收集的步數、不足一個小批次的樣本不用
        return self.total_steps // self.rollout_size * self.epochs * (self.rollout_size // self.minibatch_size)


# 2. 環境：Pendulum-v1，見 pendulum_envs.py ------------------------------------------------------------

# 3. 網路 ---------------------------------------------------------------------------------------------

# 變異數與 Flax 的預設 (lecun_normal) 相同；均勻分佈的程式編譯起來比較快
Linear = functools.partial(nnx.Linear, kernel_init=nnx.initializers.lecun_uniform())


class Body(nnx.Module):
    """演員與評論家各有一個的主幹：觀測 (..., 3) → 特徵 (..., hidden_size)。"""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.scale = (1.0, 1.0, 8.0) if config.normalize_observations else (1.0, 1.0, 1.0)  # 觀測最大是多少
        self.fc1 = Linear(3, config.hidden_size, rngs=rngs)
        self.fc2 = Linear(config.hidden_size, config.hidden_size, rngs=rngs)

    def __call__(self, states: jax.Array) -> jax.Array:
        x = nnx.relu(self.fc1(states / jnp.array(self.scale)))
        return nnx.relu(self.fc2(x))


class Actor(nnx.Module):
    """演員：觀測 (..., 3) → 動作的常態分佈 (...)，單位是力矩 N·m。"""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.body = Body(config, rngs)
        # 兩個輸出頭的權重從 0 開始：第一個策略在每個狀態都一樣，只由偏置決定
        zeros, bias = nnx.initializers.zeros_init(), nnx.initializers.constant(config.sigma_bias)
        self.mu = Linear(config.hidden_size, 1, kernel_init=zeros, rngs=rngs)
        self.sigma = Linear(config.hidden_size, 1, kernel_init=zeros, bias_init=bias, rngs=rngs)

    def __call__(self, states: jax.Array) -> tfd.Normal:
        x = self.body(states)
        mu = self.mu(x)[..., 0]
        sigma = nnx.softplus(self.sigma(x)[..., 0]) + MIN_SIGMA  # 標準差必須是正的
        return tfd.Normal(mu, sigma)


class Critic(nnx.Module):
    """評論家：觀測 (..., 3) → 價值 V(s) (...)，單位是乘過 reward_scale 的獎勵。"""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.body = Body(config, rngs)
        self.fc_out = Linear(config.hidden_size, 1, rngs=rngs)

    def __call__(self, states: jax.Array) -> jax.Array:
        return self.fc_out(self.body(states))[..., 0]


# 4. 記憶：同策略的資料，學完就丟 ---------------------------------------------------------------------

# 所有環境的同一步，每個欄位的第一個維度是 num_envs；mu 與 sigma 是收集資料的策略 π_old
Transition = namedtuple("Transition", "state action log_prob mu sigma value next_state reward terminated truncated")
# 學習用的資料；收集完是 (步, 環境, …)，學習前攤平成 (樣本, …)
Batch = namedtuple("Batch", "states actions log_probs old_mu old_sigma advantages returns")


def compute_gae(rewards, values, next_values, terminated, truncated, gamma, gae_lambda):
    """廣義優勢估計 (GAE)，arXiv 1506.02438 式 (11)、(16)，從後往前遞迴。

    形狀都是 (步, 環境)。終止 (terminated) 之後沒有未來，不 bootstrap；截斷 (truncated) 只是時間到了，照樣 bootstrap，
    next_values 是回合真正的最後一個觀測的價值。兩者都是回合的邊界，優勢不可以流過去。
    """
    advantages = np.zeros_like(rewards)
    next_advantage = np.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * (1 - terminated[t]) * next_values[t] - values[t]
        done = terminated[t] | truncated[t]
        next_advantage = delta + gamma * gae_lambda * (1 - done) * next_advantage
        advantages[t] = next_advantage
    return advantages


def episode_return(rewards, gamma):
    """REINFORCE 的分數：每一步都拿到所屬回合從頭算起的折扣回報。形狀 (步, 環境)，步數是 200 的倍數。"""
    episodes = rewards.reshape(-1, EPISODE_STEPS, rewards.shape[1])
    returns = np.tensordot(gamma ** np.arange(EPISODE_STEPS), episodes, axes=(0, 1))
    return np.repeat(returns, EPISODE_STEPS, axis=0).astype(rewards.dtype)


class RolloutBuffer(list):
    """一次收集的資料，一步一個 Transition。學完就要 clear()：策略變了，舊資料不再是新策略的樣本。"""

    add = list.append

    def calculate_advantages_and_returns(self, critic: Critic, config: Config) -> Batch:
        """每一步的優勢，以及評論家的正確答案 (returns = 優勢 + V)；形狀 (步, 環境, …)。"""
        steps = Transition(*map(np.stack, zip(*self, strict=True)))
        rewards = (steps.reward * config.reward_scale).astype(np.float32)
        score, ends = config.rung.score, (steps.terminated, steps.truncated)
        if config.critic:
            next_values = np.asarray(snapshot(Critic.__call__, critic)(steps.next_state))
            gae_lambda = config.gae_lambda if score == "gae" else 1.0
            advantages = compute_gae(rewards, steps.value, next_values, *ends, config.gamma, gae_lambda)
        elif score == "return":
            advantages = episode_return(rewards, config.gamma)
        else:  # 沒有評論家，V 是 0：只剩之後的獎勵，加到回合結束
            zeros = np.zeros_like(rewards)
            advantages = compute_gae(rewards, zeros, zeros, *ends, config.gamma, 1.0)
            advantages -= {"mean": 1, "bad_mean": -1}.get(score, 0) * advantages.mean()
        old_policy = steps.log_prob, steps.mu, steps.sigma
        return Batch(steps.state, steps.action, *old_policy, advantages, advantages + steps.value)


# 5. 智慧體 -------------------------------------------------------------------------------------------


def clipped_objective(ratio, advantage, clip_epsilon):
    """PPO-Clip 的目標，arXiv 1707.06347 式 (7)：兩者取小，越界之後不再有繼續走的誘因。"""
    clipped_ratio = jnp.clip(ratio, 1 - clip_epsilon, 1 + clip_epsilon)
    return jnp.minimum(ratio * advantage, clipped_ratio * advantage)


def penalized_objective(ratio, advantage, new_policy, old_policy, beta):
    """PPO-KL 的目標，arXiv 1707.06347 式 (8)；KL 的方向照筆記，是 KL(π_new ‖ π_old)。"""
    return ratio * advantage - beta * tfd.kl_divergence(new_policy, old_policy)


class PolicyGradientAgent(nnx.Module):
    """演員、評論家，以及各自的最佳化器；階梯上的每一階都是它。筆記叫它 PPOAgent。"""

    def __init__(self, config: Config, seed: jax.Array):
        self.config = config
        rngs = nnx.Rngs(jax.random.key(seed))
        self.actor = Actor(config, rngs)
        self.critic = Critic(config, rngs)
        self.actor_optimizer = make_optimizer(self.actor, config.actor_learning_rate, config)
        self.critic_optimizer = make_optimizer(self.critic, config.critic_learning_rate, config)

    def policy(self):
        """這一刻的策略：觀測 → 分佈，權重之後再學也不變。"""
        return snapshot(Actor.__call__, self.actor)

    def actor_objective(self, actor: Actor, batch: Batch) -> jax.Array:
        """演員要最大化的目標：每個樣本的比例乘優勢，加上演算法的鎖，取平均。"""
        advantage = batch.advantages
        if self.config.standardizes:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        new_policy = actor(batch.states)
        ratio = jnp.exp(new_policy.log_prob(batch.actions) - batch.log_probs)
        if self.config.rung.lock == "clip":
            objective = clipped_objective(ratio, advantage, self.config.clip_epsilon)
        elif self.config.rung.lock == "kl":
            old_policy = tfd.Normal(batch.old_mu, batch.old_sigma)
            objective = penalized_objective(ratio, advantage, new_policy, old_policy, self.config.beta)
        else:  # ratio = 1 時，它的梯度就是 ∇ log π · 優勢 (4.2)
            objective = ratio * advantage
        return jnp.mean(objective)

    def train_step(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """用一個小批次更新評論家與演員各一次；回傳兩個損失。"""
        critic_loss = jnp.zeros(())
        if self.config.critic:
            critic_loss, grads = nnx.value_and_grad(
                lambda critic: jnp.mean((critic(batch.states) - batch.returns) ** 2)
            )(self.critic)
            self.critic_optimizer.update(self.critic, grads)
        # 負號：最佳化器只會往下走
        actor_loss, grads = nnx.value_and_grad(lambda actor: -self.actor_objective(actor, batch))(self.actor)
        self.actor_optimizer.update(self.actor, grads)
        return actor_loss, critic_loss


def make_optimizer(network: nnx.Module, learning_rate: float, config: Config) -> nnx.Optimizer:
    """Adam，先裁剪梯度的範數；學習率用整個訓練的更新次數線性降到 0。"""
    schedule = optax.linear_schedule(learning_rate, 0.0, config.updates)
    adam = optax.adam(schedule if config.anneal_learning_rate else learning_rate, eps=1e-5)
    return nnx.Optimizer(network, optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adam), wrt=nnx.Param)


make_agent = extras.compiled_once(PolicyGradientAgent)  # make_agent(config) 只編譯一次，不是一個一個小運算


@nnx.jit
def learn(agent: PolicyGradientAgent, batch: Batch, minibatches: jax.Array):
    """整個學習階段編譯成一次呼叫。batch 的欄位是 (樣本, …)；minibatches (更新次數, 小批次) 是樣本的編號。"""

    def step(agent, indices):
        return agent, agent.train_step(jax.tree.map(lambda x: x[indices], batch))

    _, losses = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(agent, minibatches)
    ratio = jnp.exp(agent.actor(batch.states).log_prob(batch.actions) - batch.log_probs)
    return losses, jnp.mean(jnp.abs(ratio - 1) > agent.config.clip_epsilon)  # 學完之後，界線之外的樣本比率


# 6. 訓練：收集、計算目標、學習、丟棄 -----------------------------------------------------------------


def select_action(networks: tuple[Actor, Critic], states: jax.Array, seed: jax.Array):
    """採樣：觀測 (num_envs, 3) → 動作、對數機率、策略的 μ 與 σ、價值，各 (num_envs,)。"""
    actor, critic = networks
    policy = actor(states)
    actions = policy.sample(seed=jax.random.key(seed))
    return actions, policy.log_prob(actions), policy.loc, policy.scale, critic(states)


def collect(agent: PolicyGradientAgent, envs: PendulumEnvs, buffer: RolloutBuffer, num_steps: int, rng) -> None:
    """用 π_old (這一刻的權重) 走 num_steps 步，存進 buffer；這裡是 NumPy (環境) 與 JAX (網路) 的橋樑。"""
    old_policy = snapshot(select_action, (agent.actor, agent.critic))
    for _ in range(num_steps):
        states = envs.states
        actions, *others = map(np.asarray, old_policy(states, rng.integers(2**32, dtype=np.uint32)))
        buffer.add(Transition(states, actions, *others, *envs.step(actions)))


@dataclass
class Result:
    agent: PolicyGradientAgent
    env_steps: int
    curve: list[tuple[int, float]]  # (步數, 在那一步走完的 num_envs 個回合的平均回報)
    clip_fractions: list[float]  # 每個學習階段之後，比例在界線之外的樣本比率
    data_bytes: int  # 學習一次用的資料佔幾個位元組
    seconds: float
    interrupted: bool  # 被 Ctrl-C 提早結束


def train(config: Config, stop=None, progress: bool = True) -> Result:
    """照 config 訓練一個智慧體；stop 被設定時，停在兩次收集之間。損失變成 NaN 或無限大就丟出 LessonError。"""
    start = time.perf_counter()
    rng = np.random.default_rng(config.seed)
    agent = make_agent(config)
    envs = PendulumEnvs(config.num_envs, config.seed)
    buffer = RolloutBuffer()
    clip_fractions, env_steps, data_bytes = [], 0, 0
    size = config.rollout_size
    total, used = config.total_steps // size * size, size // config.minibatch_size * config.minibatch_size
    with tqdm(total=total, desc="訓練", unit="步", disable=None if progress else True) as bar:
        while env_steps < total and not (stop and stop.is_set()):
            collect(agent, envs, buffer, config.num_steps, rng)
            env_steps += size
            batch = buffer.calculate_advantages_and_returns(agent.critic, config)
            samples = Batch(*(x.reshape(size, *x.shape[2:]) for x in batch))
            order = [rng.permutation(size)[:used] for _ in range(config.epochs)]  # 每一遍重新洗牌
            losses, clip_fraction = learn(agent, samples, np.concatenate(order).reshape(-1, config.minibatch_size))
            buffer.clear()
            if not np.isfinite(losses).all():
                raise lesson.LessonError(f"第 {env_steps} 步的損失不是有限的數；把學習率調小再試", 1)
            clip_fractions.append(float(clip_fraction))
            data_bytes = extras.array_bytes(batch)
            if envs.finished:
                bar.set_postfix_str(f"平均回報 {envs.finished[-1].mean():.0f}")
            bar.update(size)
    ends = EPISODE_STEPS * config.num_envs * np.arange(1, len(envs.finished) + 1)  # 每一輪回合在第幾步走完
    curve = [(int(step), float(returns.mean())) for step, returns in zip(ends, envs.finished, strict=True)]
    return Result(agent, env_steps, curve, clip_fractions, data_bytes, time.perf_counter() - start, env_steps < total)


# 7. 評估 ---------------------------------------------------------------------------------------------


def evaluate(agent: PolicyGradientAgent) -> np.ndarray:
    """用平均動作玩 100 個回合，起點見 evaluation_starts；回傳 (100,) 個回報。"""
    envs, policy = PendulumEnvs(len(evaluation_starts()), seed=0), agent.policy()
    envs.start(evaluation_starts())
    for _ in range(EPISODE_STEPS):
        envs.step(np.asarray(policy(envs.states).loc))
    return envs.finished[-1]


# 8. 主程式 -------------------------------------------------------------------------------------------


def main() -> None:
    config = lesson.parse(Config, "第 3 課：從 REINFORCE 到 PPO，把單擺甩上去")
    lesson.find_devices()
    if config.watch:
        return watch(RUN, extras.play, make_agent(config), config, extras.FRAME_MILLISECONDS)
    if config.compare:
        return extras.compare(RUN, config, ALGORITHMS, train, evaluate, collect, RolloutBuffer())
    result = train(config, RUN.stop)
    RUN.require_learnt(result.env_steps)
    returns = evaluate(result.agent)
    eval_mean = float(returns.mean())
    solved = eval_mean >= TARGET_RETURN
    save_weights(config.out_dir / "weights.npz", result.agent)
    RUN.save_metrics(
        config, result.seconds, env_steps=result.env_steps, eval_returns=returns.tolist(), eval_mean=eval_mean,
        solved=solved, curve=result.curve, clip_fractions=result.clip_fractions,
        memory_bytes=extras.memory_bytes(result.agent, result.data_bytes),
    )  # fmt: skip
    extras.draw(result, config, eval_mean, TARGET_RETURN, clipped_objective)
    reached = "達標" if solved else "未達標"
    print(f"{reached}：{len(returns)} 個評估回合的平均回報 {eval_mean:.1f}（目標 {TARGET_RETURN:.1f}）")
    RUN.finish(config, f"走了 {result.env_steps} 步" if result.interrupted else "")


if __name__ == "__main__":
    RUN(main)
