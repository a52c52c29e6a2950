"""第 3 課跑完之後看的東西：圖、動畫、佔多少記憶體、--compare。腳本把要用的東西傳進來，這裡不匯入腳本。"""

import functools
import os
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pendulum_envs import EPISODE_STEPS, PendulumEnvs

import lesson_extras
from lesson_extras import (
    COLORS,
    array_bytes,
    derive,
    draw_error,
    draw_mean,
    figure,
    interval,
    markdown_table,
    refuse_changed,
    save_gif,
    show_difference,
    show_mean,
)

with warnings.catch_warnings(action="ignore"):  # 它匯入時用了 JAX 將要移除的東西，讀者管不著；腳本從這裡之後才匯入它
    import tensorflow_probability.substrates.jax  # noqa: F401

MOST_GIGABYTES = 4  # 一次收集與學習最多用多少記憶體：一台筆電拿得出來的
FRAME_MILLISECONDS = 100  # 動畫每兩步一張，一步 0.05 秒
GRADIENT_ROLLOUTS = 10
LAMBDAS = (0.0, 0.5, 0.9, 0.95, 0.98, 1.0)
STARTS, COPIES = 16, 256  # 量 λ 的偏差：幾個起點、每個起點各走幾個回合
TAIL_STEPS = 1000  # 對照在截斷之後再走幾步：0.99 的 1200 次方小於 1e-5，再後面的不必算
# 筆記的設定，--compare 拿它和預設值比；其餘 (收集的長度、輸出頭的初始值) 不變。
NOTES_SETTINGS = {
    "actor_learning_rate": 3e-4,
    "critic_learning_rate": 1e-3,
    "minibatch_size": 64,
    "anneal_learning_rate": False,
    "max_grad_norm": 1e9,
    "normalize_observations": False,
    "reward_scale": 1.0,
    "sigma_bias": 0.0,
}


def memory_bytes(agent, data_bytes: int) -> dict[str, int]:
    """訓練時要記住的東西，各佔幾個位元組。"""
    parameters = array_bytes(nnx.state((agent.actor, agent.critic), nnx.Param))
    moments = array_bytes(nnx.state((agent.actor_optimizer, agent.critic_optimizer)))
    return {"parameters": parameters, "gradients": parameters, "moments": moments, "data": data_bytes}


def compiled_once(agent_class):
    """agent_class(config, 種子) 整個編譯成一次呼叫；換一個種子不必重新編譯。"""
    quickly = {"xla_backend_optimization_level": 1}  # 只執行一次的程式：編譯得快，比跑得快重要
    build = jax.jit(agent_class, static_argnums=0, compiler_options=quickly)
    return lambda config: build(replace(config, seed=0), np.uint32(config.seed))


# 檢查設定 --------------------------------------------------------------------------------------------


def check(config, algorithms) -> None:
    """幾個欄位合起來不合理，就丟出 ValueError("哪裡不對；怎樣才對")；--compare 要跑的每一種設定也都檢查。"""
    if config.compare:
        return check_compare(config, algorithms)
    size, minibatch = config.rollout_size, config.minibatch_size
    if not minibatch <= size <= config.total_steps:
        right = f"要在 --minibatch-size {minibatch} 以上，--total-steps {config.total_steps} 以下"
        raise ValueError(f"一次收集是 {size} 步 (num-envs × num-steps)；{right}")
    if not config.critic and config.num_steps % EPISODE_STEPS:
        right = f"{config.algorithm} 要看完整個回合才有分數，要是 {EPISODE_STEPS} 的倍數"
        raise ValueError(f"--num-steps 是 {config.num_steps}；{right}")
    if minibatch == 1 and config.standardizes:
        right = "一個樣本標準化之後永遠是 0，演員學不到東西；要 2 以上，或加上 --no-normalize-advantages"
        raise ValueError(f"--minibatch-size 是 1；{right}")
    # 粗估：收集的資料、樣本的順序、隱藏層、一個小批次的梯度、權重連同動差
    rows = size * (200 + 12 * config.epochs + 8 * config.hidden_size)
    gigabytes = (rows + 40 * minibatch * config.hidden_size + 40 * config.hidden_size**2) / 1e9
    if gigabytes > MOST_GIGABYTES:
        right = f"要在 {MOST_GIGABYTES} GB 以下，把 --num-envs、--num-steps、--train-epochs 或 --hidden-size 調小"
        raise ValueError(f"一次收集與學習大約要 {gigabytes:,.0f} GB 的記憶體；{right}")
    if config.updates >= 2**31:
        right = "最佳化器只數到 2³¹，把 --total-steps 或 --train-epochs 調小，或把 --minibatch-size 調大"
        raise ValueError(f"一共要更新 {config.updates:,} 次；{right}")


def check_compare(config, algorithms) -> None:
    """--compare 自己決定的旗標，不能也寫在命令列；它要跑的每一種設定都要能跑。"""
    refuse_changed(config, "--compare", ("algorithm", "watch"))
    variants(config, algorithms)
    gradient_config(config)


def variants(config, algorithms) -> dict:
    """--compare 要跑的設定：每一種演算法，加上筆記的設定。"""
    settings = {name: {"algorithm": name} for name in algorithms}
    settings["notes"] = {"algorithm": "ppo_clip", **NOTES_SETTINGS}
    return {name: derive(name, config, **changes) for name, changes in settings.items()}


def gradient_config(config):
    """量梯度變異數用的策略：ppo_clip 用四分之一的步數練出來，一次收集是整個回合。"""
    changes = {"algorithm": "ppo_clip", "num_steps": EPISODE_STEPS, "total_steps": config.total_steps // 4}
    return derive("梯度變異數 (ppo_clip，四分之一的步數)", config, **changes)


# 看它玩 ----------------------------------------------------------------------------------------------


def play(agent, render_mode: str) -> list[np.ndarray]:
    """從垂直向下的靜止狀態，用平均動作玩一個回合；rgb_array 時回傳每兩步一張的畫面。"""
    no_window = {"SDL_VIDEODRIVER": "dummy"} if render_mode == "rgb_array" else {}  # 請 SDL 不要找螢幕
    env, policy = gym.make("Pendulum-v1", render_mode=render_mode), agent.policy()
    env.reset(seed=0)
    env.unwrapped.state = np.array([np.pi, 0.0])
    state, frames = np.array([-1.0, 0.0, 0.0], np.float32), []
    with mock.patch.dict(os.environ, no_window):
        for step in range(EPISODE_STEPS):
            state, *_ = env.step(np.asarray(policy(state[None]).loc))
            if render_mode == "rgb_array" and step % 2 == 0:
                frames.append(env.render())
        env.close()
    return frames


# 圖 --------------------------------------------------------------------------------------------------


def draw(result, config, eval_mean: float, target_return: float, clipped_objective) -> None:
    draw_learning_curve(result, config, eval_mean, target_return)
    draw_clipped_objective(config, clipped_objective)
    save_gif(config.out_dir / "agent.gif", play(result.agent, "rgb_array"), FRAME_MILLISECONDS)


def draw_learning_curve(result, config, eval_mean: float, target_return: float) -> None:
    with figure(config.out_dir / "learning_curve.png", figsize=(7, 4), layout="none") as (canvas, axes):
        canvas.subplots_adjust(left=0.12, right=0.97, bottom=0.13, top=0.92)
        if result.curve:
            marker = "o" if len(result.curve) == 1 else ""  # 一個點連不成線
            axes.plot(*zip(*result.curve, strict=True), marker=marker, label="training episodes (sampled actions)")
        axes.axhline(eval_mean, color="C2", linestyle="--", label=f"evaluation, mean action: {eval_mean:.1f}")
        axes.axhline(target_return, color="0.4", linestyle=":", label=f"target: {target_return:.0f}")
        axes.set(xlabel="environment steps", ylabel="mean return", title=f"{config.algorithm} on Pendulum-v1")
        axes.legend()


def draw_clipped_objective(config, clipped_objective) -> None:
    """優勢為正、為負時，PPO-Clip 的目標隨比例怎麼變。"""
    epsilon, ratio, advantages = config.clip_epsilon, np.linspace(0, 2, 401), (1.0, -1.0)
    objectives = np.asarray(jax.jit(clipped_objective)(ratio, np.array(advantages)[:, None], epsilon))
    path = config.out_dir / "clipped_objective.png"
    with figure(path, 1, 2, figsize=(9, 3.6), layout="none") as (canvas, panels):
        canvas.subplots_adjust(left=0.08, right=0.98, bottom=0.15, top=0.9, wspace=0.15)
        for axes, advantage, objective in zip(panels, advantages, objectives, strict=True):
            axes.axvspan(1 - epsilon, 1 + epsilon, color="0.9", label="1 − ε to 1 + ε")
            axes.plot(ratio, ratio * advantage, "--", color="C1", label="no lock: ratio × advantage")
            axes.plot(ratio, objective, color="C0", lw=2.5, label="PPO-Clip")
            axes.plot(1, advantage, "o", color="black", label="a learning phase starts here")
            axes.set(xlabel="ratio = π_new / π_old", title=f"advantage {'> 0' if advantage > 0 else '< 0'}")
        panels[0].set_ylabel("objective (maximised)")
        panels[0].legend(loc="upper left")


# 比較 ------------------------------------------------------------------------------------------------


@nnx.jit
@functools.partial(nnx.vmap, in_axes=(None, 1))
def episode_gradient(actor, batch):
    """每一份環境的回合各一個梯度估計值 平均(∇ log π · 分數)；batch 的欄位是 (步, 環境, …)。"""
    return nnx.grad(lambda actor: jnp.mean(actor(batch.states).log_prob(batch.actions) * batch.advantages))(actor)


def gradient_variances(config, agent, collect, buffer, algorithms, rollouts: int) -> dict:
    """同一個策略、同一批回合，只換「分數」：每種演算法的策略梯度估計值的變異數。

    一個回合給一個估計值，分數不標準化；變異數是各個參數的變異數加總。config 的一次收集是整個回合。
    """
    seed = [config.seed, 1]  # 練這個策略用過的起點與動作，這裡不再用
    envs, rng = PendulumEnvs(config.num_envs, seed), np.random.default_rng(seed)
    gradients = {name: [] for name in algorithms}
    for _ in range(rollouts):
        collect(agent, envs, buffer, config.num_steps, rng)
        for name in algorithms:
            batch = buffer.calculate_advantages_and_returns(agent.critic, replace(config, algorithm=name))
            leaves = jax.tree.leaves(episode_gradient(agent.actor, batch))
            gradients[name].append(np.concatenate([g.reshape(config.num_envs, -1) for g in leaves], axis=1))
        buffer.clear()
    return {name: float(np.concatenate(g).var(axis=0, ddof=1).sum()) for name, g in gradients.items()}


def lambda_errors(config, agent, collect, buffer) -> dict[str, list[float]]:
    """同一個策略與評論家，LAMBDAS 的每個 λ：回合第一步的優勢估計值，偏差與標準差各多少，單位是回報。

    每個起點走 COPIES 個回合。對照是蒙地卡羅 (Monte Carlo)：同樣的回合不截斷，再走 TAIL_STEPS 步，實際的獎勵一路加起來，
    不 bootstrap。偏差是各個起點上，估計值的平均比對照的平均多多少 (方均根)。
    """
    seed = [config.seed, 2]
    envs, rng = PendulumEnvs(STARTS * COPIES, seed), np.random.default_rng(seed)
    envs.start(np.repeat(envs.random_starts()[:STARTS], COPIES, axis=0))
    collect(agent, envs, buffer, EPISODE_STEPS, rng)
    estimates = []
    for gae_lambda in LAMBDAS:
        settings = replace(config, algorithm="actor_critic", gae_lambda=gae_lambda)
        first = buffer.calculate_advantages_and_returns(agent.critic, settings).advantages[0]
        estimates.append(first.reshape(STARTS, COPIES) / config.reward_scale)
    value, rewards = buffer[0].value / config.reward_scale, [step.reward for step in buffer]
    while len(rewards) < EPISODE_STEPS + TAIL_STEPS:
        cos, sin, velocity = buffer[-1].next_state.T
        envs.start(np.stack([np.arctan2(sin, cos), velocity], axis=1))  # 截斷只是時間到了：從那裡接著走
        buffer.clear()
        collect(agent, envs, buffer, EPISODE_STEPS, rng)
        rewards += [step.reward for step in buffer]
    buffer.clear()
    monte_carlo = np.tensordot(config.gamma ** np.arange(len(rewards)), rewards, axes=1) - value
    biases = [(estimate - monte_carlo.reshape(STARTS, COPIES)).mean(axis=1) for estimate in estimates]
    return {
        "lambda_biases": [float(np.sqrt(np.mean(bias**2))) for bias in biases],
        "lambda_stds": [float(estimate.std(axis=1).mean()) for estimate in estimates],
    }


def compare(run, config, algorithms, train, evaluate, collect, buffer) -> None:
    @functools.cache
    def practised(seed: int):
        """量梯度與 λ 用的策略，一個隨機種子只練一次。"""
        return train(replace(gradient_config(config), seed=seed), run.stop, progress=False)

    @functools.cache
    def variances(seed: int) -> dict:
        """一個隨機種子的梯度變異數，每一種演算法一個。"""
        practice, agent = replace(gradient_config(config), seed=seed), practised(seed).agent
        return gradient_variances(practice, agent, collect, buffer, algorithms, GRADIENT_ROLLOUTS)

    def measure(name: str, variant) -> dict:
        if practised(variant.seed).interrupted:  # 沒練完的策略，什麼都不量
            return {}
        measured = {"gradient_variances": variances(variant.seed).get(name)}
        if name == "actor_critic":
            practice = replace(gradient_config(config), seed=variant.seed)
            measured |= lambda_errors(practice, practised(variant.seed).agent, collect, buffer)
        if run.stop.is_set():
            return {}
        result = train(variant, run.stop, progress=False)
        if result.interrupted:
            return {}
        if name == next(iter(algorithms)):  # 對照：還沒有訓練的策略
            untrained = type(result.agent)(variant, np.uint32(variant.seed))
            measured["untrained"] = float(evaluate(untrained).mean())
        return (measured if name in algorithms else {}) | {
            "curves": result.curve,
            "eval_means": float(evaluate(result.agent).mean()),
            "clip_fractions": float(np.mean(result.clip_fractions)),
        }

    lesson_extras.compare(run, config, variants(config, algorithms), measure, comparison_table, draw_comparison)


def relative_variances(rows: dict, name: str) -> np.ndarray:
    """策略梯度估計值的變異數，同一個隨機種子的 reinforce 是 1；一個隨機種子一個數字。"""
    variances = rows[name]["gradient_variances"]
    return np.divide(variances, rows["reinforce"]["gradient_variances"][: len(variances)])


def comparison_table(rows: dict) -> str:
    """回報是各個隨機種子的評估平均；差是同一個種子相減。最後一列是還沒有訓練的策略。"""
    lines, untrained = [], next(iter(rows.values()))["untrained"]
    reference = rows.get("ppo_clip", {"eval_means": []})["eval_means"]
    for name, row in rows.items():
        means, variance = row["eval_means"], "—"
        shared = min(len(means), len(reference))  # 中斷時每一列的種子不一樣多
        difference = show_difference(means[:shared], reference[:shared]) if shared and name != "ppo_clip" else "—"
        learnt = show_difference(means, untrained[: len(means)])
        if row.get("gradient_variances"):
            variance = show_mean(relative_variances(rows, name), "{:.3g}")
        share = show_mean(100 * np.array(row["clip_fractions"]))
        lines.append([f"`{name}`", show_mean(means), f"{min(means):.1f}", difference, learnt, variance, share])
    lines.append(["未訓練", show_mean(untrained), f"{min(untrained):.1f}", *["—"] * 4])
    header = (
        "演算法",
        "平均回報 [95 %]",
        "最差的種子",
        "和 ppo_clip 的差 [95 %]",
        "和未訓練的差 [95 %]",
        "梯度變異數 (reinforce = 1) [95 %]",
        "學習後比例越界 (%) [95 %]",
    )
    table = markdown_table(header, lines)
    return table + ("\n" + lambda_table(rows["actor_critic"]) if rows.get("actor_critic") else "")


def lambda_table(row: dict) -> str:
    """lambda_errors 的表格。"""
    columns = zip(LAMBDAS, np.transpose(row["lambda_biases"]), np.transpose(row["lambda_stds"]), strict=True)
    lines = [[f"{x:g}", show_mean(bias), show_mean(std)] for x, bias, std in columns]
    return markdown_table(("λ", "偏差 (方均根) [95 %]", "標準差 [95 %]"), lines)


def draw_curves(axes, label: str, curves: list, color: str, linestyle: str = "-") -> None:
    steps, values = np.array(curves[0])[:, 0], np.array(curves)[:, :, 1]
    draw_mean(axes, steps, values, label=label, color=color, linestyle=linestyle)
    axes.set(xlabel="environment steps", ylabel="mean return of training episodes")


def draw_comparison(rows: dict, out_dir: Path) -> None:
    """comparison.png：學習曲線與梯度的變異數；lambda.png：λ 的偏差與標準差；notes_settings.png：筆記的設定與預設值。"""
    rows = lesson_extras.draw_whole(rows)
    seeds = len(rows["notes"]["curves"])  # 最後一列；它有幾個，別的至少有幾個
    algorithms = [name for name in rows if name != "notes"]
    path, options = out_dir / "comparison.png", {"figsize": (12, 5), "width_ratios": [3, 2]}
    with figure(path, 1, 2, **options) as (_, (left, right)):
        for i, name in enumerate(algorithms):
            draw_curves(left, name, rows[name]["curves"], f"C{i}", "-" if i < len(COLORS) else "--")
            variance = relative_variances(rows, name)
            bar = right.barh(name, variance.mean(), xerr=draw_error(variance), color=f"C{i}")
            right.bar_label(bar, fmt="%.2g", padding=3)
        untrained = np.mean(rows[algorithms[0]]["untrained"])
        left.axhline(untrained, color="0.4", linestyle=":", label=f"untrained: {untrained:.0f}")
        left.set_title(f"Pendulum-v1: mean and 95 % interval, {seeds} seeds")
        left.legend(loc="upper right", bbox_to_anchor=(1, 0.82), fontsize=8, ncols=3)
        right.set(xscale="log", xlim=(1e-3, 20), xlabel="reinforce = 1", title="variance of the policy gradient")
        right.invert_yaxis()
    with figure(out_dir / "lambda.png", figsize=(6, 3.6)) as (_, axes):
        for key, label in (("lambda_biases", "bias (RMS)"), ("lambda_stds", "standard deviation")):
            values = np.array(rows["actor_critic"][key])
            low, high = np.transpose([interval(column) for column in values.T])
            axes.errorbar(LAMBDAS, values.mean(axis=0), yerr=(values.mean(axis=0) - low, high - values.mean(axis=0)),
                          marker="o", capsize=3, label=label)  # fmt: skip
        axes.set(xlabel="λ of GAE", ylabel="units of return", title="advantage of the first step: bias and spread")
        axes.legend()
    with figure(out_dir / "notes_settings.png", figsize=(7, 4)) as (_, axes):
        draw_curves(axes, "defaults of this lesson", rows["ppo_clip"]["curves"], "C0")
        draw_curves(axes, "settings of the notes", rows["notes"]["curves"], "C1")
        axes.set_title(f"ppo_clip: mean and 95 % interval, {seeds} seeds")
        axes.legend(loc="lower right")
