"""第 3 課的數學對照獨立的算法，以及完整的預設執行。"""

import dataclasses
import itertools
import math
import subprocess
import sys

import gymnasium as gym
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from lessons import environment, load, metrics, run, script

LESSON = "3_Pendulum"
pendulum = load(LESSON)
extras, lesson, lesson_extras = pendulum.extras, pendulum.lesson, pendulum.extras.lesson_extras
finite = st.floats(-10, 10, width=32)
shapes = st.tuples(st.integers(1, 12), st.integers(1, 3))


@st.composite
def rollouts(draw):
    """隨機長度、幾個環境、任意位置的終止與截斷。"""
    shape = draw(shapes)
    floats = [draw(hnp.arrays(np.float64, shape, elements=finite)) for _ in range(3)]
    ends = [draw(hnp.arrays(bool, shape)) for _ in range(2)]
    return *floats, *ends


@given(rollouts(), st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_its_definition(rollout, gamma, gae_lambda):
    """式 (16)：A_t = Σ_l (γλ)^l δ_{t+l}，加到回合結束為止；O(T²)。"""
    rewards, values, next_values, terminated, truncated = rollout
    advantages = pendulum.compute_gae(*rollout, gamma, gae_lambda)
    for t, env in np.ndindex(rewards.shape):
        expected = 0.0
        for k in range(t, len(rewards)):
            future = 0.0 if terminated[k, env] else gamma * next_values[k, env]
            expected += (gamma * gae_lambda) ** (k - t) * (rewards[k, env] + future - values[k, env])
            if terminated[k, env] or truncated[k, env]:
                break
        assert advantages[t, env] == pytest.approx(expected, abs=1e-6)


def test_the_worked_example_of_the_readme():
    """README「手算四步」：γ = 0.9、λ = 0.5，第四步被截斷。"""
    rewards, values = np.array([[-1.0], [-0.5], [0.0], [0.0]]), np.array([[-2.0], [-1.5], [-1.0], [-0.5]])
    next_values = np.array([[-1.5], [-1.0], [-0.5], [-0.4]])
    terminated, truncated = np.zeros((4, 1), bool), np.array([[False], [False], [False], [True]])
    advantages = pendulum.compute_gae(rewards, values, next_values, terminated, truncated, 0.9, 0.5)
    np.testing.assert_allclose(advantages[:, 0], [-0.1808675, 0.37585, 0.613, 0.14], atol=1e-12)
    terminated[3] = True  # 若第四步是終止：δ = 0 − (−0.5)
    advantages = pendulum.compute_gae(rewards, values, next_values, terminated, truncated, 0.9, 0.5)
    assert advantages[3, 0] == pytest.approx(0.5)


def test_reinforce_gives_every_step_the_whole_episode():
    rewards = np.random.default_rng(0).normal(size=(400, 3))
    scores = pendulum.episode_return(rewards, 0.9)
    for episode, env in np.ndindex(2, 3):
        steps = slice(200 * episode, 200 * episode + 200)
        expected = sum(0.9**k * reward for k, reward in enumerate(rewards[steps, env]))
        np.testing.assert_allclose(scores[steps, env], expected)


RATIOS = [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("advantage", [2.0, -3.0])
def test_clipped_objective_and_its_gradient(ratio, advantage):
    """優勢為正，只有比例超過 1 + ε 才沒有梯度；優勢為負，只有低於 1 - ε 才沒有。"""
    stopped = ratio > 1.2 if advantage > 0 else ratio < 0.8
    bound = 1.2 if advantage > 0 else 0.8
    value, gradient = jax.value_and_grad(pendulum.clipped_objective)(ratio, advantage, 0.2)
    assert value == pytest.approx((bound if stopped else ratio) * advantage)
    assert gradient == pytest.approx(0.0 if stopped else advantage)


@given(finite, finite, st.floats(0.05, 5), st.floats(0.05, 5), st.floats(0, 3))
@settings(max_examples=30)
def test_kl_penalty_equals_the_kl_of_two_normals(mu_new, mu_old, sigma_new, sigma_old, beta):
    """KL(N₁ ‖ N₂) = ln(σ₂/σ₁) + (σ₁² + (μ₁ − μ₂)²) / 2σ₂² − 1/2"""
    new, old = pendulum.tfd.Normal(mu_new, sigma_new), pendulum.tfd.Normal(mu_old, sigma_old)
    kl = math.log(sigma_old / sigma_new) + (sigma_new**2 + (mu_new - mu_old) ** 2) / (2 * sigma_old**2) - 0.5
    objective = pendulum.penalized_objective(1.5, 2.0, new, old, beta)
    assert objective == pytest.approx(3.0 - beta * kl, rel=1e-4, abs=1e-4)


def small_config(algorithm="ppo_clip", **changes):
    settings = {"num_envs": 2, "total_steps": 400, "train_epochs": 2, "hidden_size": 8} | changes
    return pendulum.Config(algorithm=algorithm, **settings)


def collect_once(config):
    agent, buffer = pendulum.make_agent(config), pendulum.RolloutBuffer()
    envs = pendulum.PendulumEnvs(config.num_envs, 0)
    pendulum.collect(agent, envs, buffer, config.num_steps, np.random.default_rng(0))
    return agent, buffer


def test_actions_probabilities_and_values_are_numpy():
    """收集到的對數機率與 SciPy 的常態分佈一致；μ、σ、價值是網路這一刻的輸出。"""
    agent, buffer = collect_once(
        small_config(sigma_bias=0.3, num_envs=5, num_steps=10, total_steps=50, minibatch_size=9)
    )
    for step in buffer:
        assert all(type(x) is np.ndarray and len(x) == 5 for x in step)
        policy = agent.actor(step.state)
        np.testing.assert_allclose(step.mu, policy.mean(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(step.sigma, policy.stddev(), rtol=1e-5)
        np.testing.assert_allclose(
            step.log_prob, scipy.stats.norm(step.mu, step.sigma).logpdf(step.action), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(step.value, agent.critic(step.state), rtol=1e-4, atol=1e-5)
    assert np.std([step.action for step in buffer]) == pytest.approx(float(buffer[0].sigma[0]), rel=0.3)


def test_a_snapshot_keeps_its_weights():
    agent = pendulum.make_agent(small_config())
    states = np.ones((4, 3), np.float32)
    policy = agent.policy()
    before = np.asarray(policy(states).loc)
    agent.actor.mu.bias[...] += 1.0
    np.testing.assert_array_equal(policy(states).loc, before)
    np.testing.assert_allclose(agent.policy()(states).loc, before + 1.0, rtol=1e-6)


def test_truncation_bootstraps_from_the_true_last_observation():
    """每個回合 200 步：第 200 步的下一個觀測是回合真正的結尾，不是重置後的起點。"""
    config = small_config(num_steps=201, total_steps=402)
    agent, buffer = collect_once(config)
    last, after = buffer[199], buffer[200]
    assert last.truncated.all()
    assert not last.terminated.any()
    assert np.abs(last.next_state - after.state).max() > 1e-3  # after.state 已經是新回合的起點
    for step, following in itertools.pairwise(buffer[:199]):
        np.testing.assert_array_equal(step.next_state, following.state)
    batch = buffer.calculate_advantages_and_returns(agent.critic, config)
    bootstrap = config.gamma * np.asarray(agent.critic(last.next_state))
    np.testing.assert_allclose(batch.returns[199], last.reward * config.reward_scale + bootstrap, rtol=1e-4, atol=1e-5)


def test_the_environments_walk_like_gymnasiums():
    """一起走的環境，和 Gymnasium 一份一份走的 (同樣的亂數與動作) 走一樣的路：觀測、獎勵、截斷、回合的回報。"""
    envs = pendulum.PendulumEnvs(5, 0)
    same_step = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    theirs = gym.make_vec("Pendulum-v1", num_envs=5, vectorization_mode="sync", vector_kwargs=same_step)
    theirs.reset(seed=0)
    twins = pendulum.PendulumEnvs(5, 0)  # 亂數和 envs 一樣：第一個起點抽過了，下一個還沒
    for i, env in enumerate(theirs.envs):
        env.unwrapped.np_random, env.unwrapped.state = twins.generators[i], twins.physics.state[:, i]
    actions, returns = np.random.default_rng(0).normal(scale=2, size=(450, 5)).astype(np.float32), np.zeros(5)
    for step, action in enumerate(actions, start=1):
        next_states, rewards, terminated, truncated = envs.step(action)
        after, their_rewards, their_terminated, their_truncated, infos = theirs.step(action[:, None])
        np.testing.assert_array_equal(truncated, their_truncated)
        np.testing.assert_array_equal(terminated, their_terminated)
        np.testing.assert_allclose(rewards, their_rewards, rtol=1e-9)
        np.testing.assert_allclose(envs.states, after, atol=1e-6)
        np.testing.assert_allclose(next_states, np.stack(infos["final_obs"]) if step % 200 == 0 else after, atol=1e-6)
        returns += their_rewards
        if step % 200 == 0:
            np.testing.assert_allclose(envs.finished[-1], returns, rtol=1e-9)
            returns[:] = 0
    theirs.close()


def test_neighbouring_seeds_share_no_start():
    """以前第 i 份環境的種子是 seed + i：種子 0 與 1 的 16 個起點有 15 個相同。"""
    starts = []
    for seed in (0, 1, 2, [0, 1]):
        envs = pendulum.PendulumEnvs(16, seed)
        starts += [tuple(start) for start in envs.physics.state.T]
        starts += [tuple(start) for _ in range(3) for start in envs.random_starts()]
        assert np.abs(envs.physics.state[0]).max() <= np.pi
        assert np.abs(envs.physics.state[1]).max() <= 1
    assert len(set(starts)) == len(starts) == 4 * 4 * 16
    again = pendulum.PendulumEnvs(16, 0)
    np.testing.assert_array_equal([tuple(start) for start in again.physics.state.T], starts[:16])


def test_each_rung_of_the_staircase_turns_one_switch():
    stairs = [rung for name, rung in pendulum.ALGORITHMS.items() if name != "bad_baseline"]
    for below, above in [*itertools.pairwise(stairs[:-1]), (stairs[-3], stairs[-1])]:
        assert sum(a != b for a, b in zip(below, above, strict=True)) == 1


@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_the_scores_without_a_critic_follow_their_definitions(seed):
    """之後的獎勵照定義一項一項加；兩種基線是整批的平均，一個減、一個加。"""
    rng, gamma = np.random.default_rng(seed), 0.9
    rewards, buffer = rng.normal(size=(400, 2)), pendulum.RolloutBuffer()
    for t in range(400):
        zeros, no, end = np.zeros(2, np.float32), np.zeros(2, bool), np.full(2, t % 200 == 199)
        buffer.add(pendulum.Transition(*[zeros] * 7, rewards[t], no, end))

    def scores(algorithm):
        config = small_config(algorithm, gamma=gamma, reward_scale=1.0)
        return buffer.calculate_advantages_and_returns(None, config).advantages

    steps = [0, 57, 199, 200, 399]
    ends = [200 * (t // 200) + 200 for t in steps]
    expected = [sum(gamma ** (k - t) * rewards[k] for k in range(t, end)) for t, end in zip(steps, ends, strict=True)]
    to_go = scores("reward_to_go")
    np.testing.assert_allclose(to_go[steps], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores("mean_baseline"), to_go - to_go.mean(), atol=1e-5)
    np.testing.assert_allclose(scores("bad_baseline"), to_go + to_go.mean(), atol=1e-5)


def flat(state):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state)])


def weights(module):
    return flat(pendulum.nnx.state(module))


def after_two_steps(algorithm, **changes):
    """同一批資料、同一個起點，更新兩次之後的智慧體 (第二次的比例已經不是 1)。"""
    config = small_config(algorithm, actor_learning_rate=0.05, num_envs=1, total_steps=200, **changes)
    agent, buffer = collect_once(config)
    batch = buffer.calculate_advantages_and_returns(agent.critic, config)
    step = pendulum.nnx.jit(lambda agent, batch: agent.train_step(batch))
    for _ in range(2):
        step(agent, batch)
    return agent


@pytest.mark.parametrize(
    ("algorithm", "change", "matters"),
    [
        ("ppo_unclipped", {"clip_epsilon": 0.001}, False),
        ("ppo_clip", {"clip_epsilon": 0.001}, True),
        ("ppo_clip", {"beta": 100.0}, False),
        ("ppo_kl", {"beta": 100.0}, True),
        ("reinforce_baseline", {"gae_lambda": 0.0}, False),  # 沒有 gae：λ 不起作用
        ("actor_critic", {"gae_lambda": 0.0}, True),
    ],
)
def test_a_switch_decides_whether_its_hyper_parameter_matters(algorithm, change, matters):
    actors = weights(after_two_steps(algorithm).actor), weights(after_two_steps(algorithm, **change).actor)
    assert np.array_equal(*actors) != matters


@pytest.mark.parametrize("algorithm", pendulum.ALGORITHMS)
def test_the_critic_learns_only_where_it_is_used(algorithm):
    agent = after_two_steps(algorithm)
    learned = not np.array_equal(weights(agent.critic), weights(pendulum.make_agent(small_config()).critic))
    assert learned == (pendulum.ALGORITHMS[algorithm].score in ("value", "gae"))


@pytest.mark.parametrize(("algorithm", "epochs"), [("actor_critic", 1), ("ppo_clip", 3)])
def test_reuse_decides_how_often_the_data_is_learnt(algorithm, epochs):
    agent = pendulum.train(small_config(algorithm, train_epochs=3), progress=False).agent
    assert agent.actor_optimizer.step[...] == epochs * (400 // 128)


@pytest.mark.parametrize("algorithm", pendulum.ALGORITHMS)
def test_every_objective_starts_as_the_policy_gradient(algorithm):
    """ratio = 1 時，每一種目標的梯度都是 平均(∇ log π · 分數)：鎖只管走多遠。見 4.2。"""
    agent, buffer = collect_once(small_config(algorithm, normalize_advantages=False))
    batch = buffer.calculate_advantages_and_returns(agent.critic, small_config(algorithm))

    def policy_gradient(actor):
        return jnp.mean(actor(batch.states).log_prob(batch.actions) * batch.advantages)

    objective = flat(pendulum.nnx.grad(lambda actor: agent.actor_objective(actor, batch))(agent.actor))
    np.testing.assert_allclose(objective, flat(pendulum.nnx.grad(policy_gradient)(agent.actor)), rtol=1e-3, atol=1e-5)
    assert np.abs(objective).max() > 0


def test_an_update_raises_the_objective():
    """正負號：更新之後，同一批資料上的目標要變大，評論家的誤差要變小。"""
    agent, buffer = collect_once(small_config("actor_critic"))
    batch = buffer.calculate_advantages_and_returns(agent.critic, small_config("actor_critic"))
    before = agent.actor_objective(agent.actor, batch), np.mean((agent.critic(batch.states) - batch.returns) ** 2)
    agent.train_step(batch)
    assert agent.actor_objective(agent.actor, batch) > before[0]
    assert np.mean((agent.critic(batch.states) - batch.returns) ** 2) < before[1]


def test_the_clip_fraction_counts_ratios_beyond_the_bounds():
    config = small_config(train_epochs=10, actor_learning_rate=0.05, total_steps=400)
    agent, buffer = collect_once(config)
    batch = buffer.calculate_advantages_and_returns(agent.critic, config)
    samples = jax.tree.map(lambda x: np.reshape(x, (400, *x.shape[2:])), batch)
    _, clip_fraction = pendulum.learn(agent, samples, np.arange(384).reshape(-1, 64))
    ratio = np.exp(np.asarray(agent.actor(samples.states).log_prob(samples.actions)) - samples.log_probs)
    assert float(clip_fraction) == pytest.approx(np.mean((ratio < 0.8) | (ratio > 1.2)), abs=2 / 400)
    assert clip_fraction > 0


def test_evaluation_starts_cover_every_cell_once():
    starts = pendulum.evaluation_starts()
    cells = np.floor((starts / [np.pi, 1.0] + 1) * 5).astype(int)
    assert sorted(map(tuple, cells)) == [(i, j) for i in range(10) for j in range(10)]


def test_evaluation_plays_the_mean_action_from_those_starts():
    """用單一環境重走三個回合，回報要和 evaluate 的同一個位置相同。"""
    agent = pendulum.make_agent(small_config())
    returns = pendulum.evaluate(agent)
    assert returns.shape == (100,)
    env = gym.make("Pendulum-v1")
    for i in (0, 37, 99):
        env.reset(seed=1)
        env.unwrapped.state = pendulum.evaluation_starts()[i]
        state, total = env.unwrapped._get_obs(), 0.0
        for _ in range(200):
            state, reward, _, truncated, _ = env.step(np.asarray(agent.actor(state[None]).mean()))
            total += reward
        assert truncated
        assert total == pytest.approx(returns[i], rel=1e-3)


def test_gradient_variances_follow_the_definition():
    """回合各算各的梯度，再取變異數，與 NumPy 的定義相同；後四種演算法的分數一樣。"""
    config = small_config(train_epochs=1, hidden_size=4, total_steps=1600, compare=True)
    practice = extras.gradient_config(config)
    assert (practice.algorithm, practice.num_steps, practice.total_steps) == ("ppo_clip", 200, 400)
    agent, names = pendulum.train(practice, progress=False).agent, list(pendulum.ALGORITHMS)
    variances = extras.gradient_variances(
        practice, agent, pendulum.collect, pendulum.RolloutBuffer(), names, rollouts=2
    )
    envs, buffer = pendulum.PendulumEnvs(2, [practice.seed, 1]), pendulum.RolloutBuffer()
    rng, gradients = np.random.default_rng([practice.seed, 1]), []
    for _ in range(2):
        pendulum.collect(agent, envs, buffer, 200, rng)
        batch = buffer.calculate_advantages_and_returns(agent.critic, small_config("reinforce"))
        buffer.clear()
        for env in range(2):

            def episode(actor, batch=batch, env=env):
                return jnp.mean(actor(batch.states[:, env]).log_prob(batch.actions[:, env]) * batch.advantages[:, env])

            gradients.append(flat(pendulum.nnx.grad(episode)(agent.actor)))
    assert variances["reinforce"] == pytest.approx(np.var(gradients, axis=0, ddof=1).sum(), rel=1e-3)
    assert len({variances[name] for name in ("actor_critic", "ppo_unclipped", "ppo_clip", "ppo_kl")}) == 1
    assert variances["reinforce"] > variances["reinforce_baseline"] > variances["actor_critic"] > 0


def test_lambda_errors_follow_the_definition(monkeypatch):
    """每個起點的平均，和蒙地卡羅比：不截斷，再走一個回合那麼長，不 bootstrap；用同樣的步從定義算一次。"""
    monkeypatch.setattr(extras, "STARTS", 2)
    monkeypatch.setattr(extras, "COPIES", 3)
    monkeypatch.setattr(extras, "TAIL_STEPS", 200)
    config = small_config(reward_scale=0.5, gamma=0.99)
    agent, kept = pendulum.make_agent(config), []

    def collect(*arguments):
        pendulum.collect(*arguments)
        kept.extend(arguments[2])

    measured = extras.lambda_errors(config, agent, collect, pendulum.RolloutBuffer())
    assert len(kept) == 400
    np.testing.assert_array_equal(kept[0].state[:3], kept[0].state[[0, 0, 0]])
    np.testing.assert_allclose(kept[200].state, kept[199].next_state, atol=1e-6)  # 接著走，不是新的回合
    rewards = np.stack([step.reward for step in kept])
    value, last = kept[0].value / 0.5, np.asarray(agent.critic(kept[199].next_state)) / 0.5
    monte_carlo = 0.99 ** np.arange(400) @ rewards - value
    full = 0.99 ** np.arange(200) @ rewards[:200] + 0.99**200 * last - value
    one_step = rewards[0] + 0.99 * kept[1].value / 0.5 - value
    for place, estimate in ((0, one_step), (-1, full)):
        bias = (estimate - monte_carlo).reshape(2, 3).mean(axis=1)
        assert measured["lambda_biases"][place] == pytest.approx(np.sqrt(np.mean(bias**2)), rel=1e-3)
        assert measured["lambda_stds"][place] == pytest.approx(estimate.reshape(2, 3).std(axis=1).mean(), rel=1e-3)


@pytest.fixture
def compared(monkeypatch, tmp_path):
    """在這個行程裡跑 --compare，訓練換成現成的結果；回傳 (結束狀態, 每一次訓練的設定)。"""
    result = pendulum.train(small_config(train_epochs=1, hidden_size=4), progress=False)
    flags = "--compare --total-steps 1600 --num-envs 2 --train-epochs 1 --hidden-size 4 --out-dir"
    monkeypatch.setattr(sys, "argv", ["pendulum.py", *flags.split(), str(tmp_path)])
    monkeypatch.setattr(lesson_extras, "SEEDS", range(1000, 1002))
    monkeypatch.setattr(pendulum, "evaluate", lambda agent: np.array([-100.0, -300.0]))
    monkeypatch.setattr(extras, "GRADIENT_ROLLOUTS", 2)
    monkeypatch.setattr(extras, "COPIES", 2)
    monkeypatch.setattr(extras, "TAIL_STEPS", 0)
    run_now = lesson.Run("test", pendulum.__file__)
    monkeypatch.setattr(pendulum, "RUN", run_now)

    def compared(press_at: int | None = None) -> tuple[int, list]:
        """press_at：在第幾次訓練 (從 0 算，連同練習用的策略) 裡按下 Ctrl-C。"""
        trained = []

        def train(config, stop, progress=True):
            trained.append(config)
            if len(trained) - 1 == press_at:
                stop.set()
            return dataclasses.replace(result, interrupted=stop.is_set())

        monkeypatch.setattr(pendulum, "train", train)
        try:
            run_now(pendulum.main)
        except SystemExit as stopped:
            return stopped.code, trained
        return 0, trained

    return compared


def test_compare_leaves_figures_a_table_and_numbers(compared, tmp_path, capsys):
    status, trained = compared()
    assert status == 0
    rows = metrics(tmp_path)["comparison"]
    assert list(rows) == [*pendulum.ALGORITHMS, "notes"]
    assert all(row["eval_means"] == [-200.0, -200.0] and len(row["curves"]) == 2 for row in rows.values())
    assert all(len(rows[name]["gradient_variances"]) == 2 for name in pendulum.ALGORITHMS)
    assert "gradient_variances" not in rows["notes"]
    table = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert table == extras.comparison_table(rows)
    assert table in capsys.readouterr().out
    for name in ("comparison.png", "lambda.png", "notes_settings.png"):
        assert (tmp_path / name).stat().st_size > 0
    each = len(pendulum.ALGORITHMS) + 2  # 每個種子練一次量變異數用的策略，其餘每種設定一次
    assert [config.seed for config in trained] == [1000] * each + [1001] * each
    practice, *variants = trained[:each]
    assert (practice.total_steps, practice.num_steps) == (400, 200)
    assert [config.algorithm for config in variants] == [*pendulum.ALGORITHMS, "ppo_clip"]
    for name, value in extras.NOTES_SETTINGS.items():
        assert getattr(variants[-1], name) == value


@pytest.mark.parametrize(("press_at", "rows"), [(3, ["reinforce", "reward_to_go"]), (11, None)])
def test_an_interrupted_comparison_keeps_what_is_done(compared, press_at, rows, tmp_path, capsys):
    """第 11 次是第二個種子量變異數用的策略：只練到一半的，一個數字都不能進表裡。"""
    status, trained = compared(press_at)
    assert (status, len(trained)) == (130, press_at + 1)
    recorded = metrics(tmp_path)["comparison"]
    assert list(recorded) == (rows or [*pendulum.ALGORITHMS, "notes"])
    assert all(len(values) == 1 for row in recorded.values() for values in row.values())
    done = len(recorded)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"已中斷：完成 {done} 次訓練")


def test_an_interrupt_in_the_first_practice_writes_nothing(compared, tmp_path, capsys):
    status, trained = compared(press_at=0)
    assert (status, len(trained)) == (130, 1)
    assert not list(tmp_path.iterdir())
    assert "沒有寫任何檔案" in capsys.readouterr().out


def refusal(**changes) -> str:
    with pytest.raises(ValueError, match="；") as refused:
        pendulum.Config(**changes)
    return str(refused.value)


def test_what_compare_derives_is_checked_before_any_work():
    """四分之一的步數不夠收集一次，或一次收集 (整個回合) 放不下一個小批次：以前除以零，或量到沒有練過的策略。"""
    assert refusal(compare=True, num_steps=400, minibatch_size=4000).startswith("--compare 的 梯度變異數")
    assert refusal(compare=True, total_steps=4 * 3200 - 1).startswith("--compare 的 梯度變異數")
    pendulum.Config(compare=True, total_steps=4 * 3200)
    assert refusal(compare=True, num_steps=100).startswith("--compare 的 reinforce：")
    assert refusal(compare=True, minibatch_size=1).startswith("--compare 的 mean_baseline：")
    for changes in ({"algorithm": "ppo_kl"}, {"watch": "weights.npz"}):
        assert f"--{next(iter(changes))}" in refusal(compare=True, **changes)


def test_a_single_standardised_sample_teaches_nothing_and_is_refused():
    assert "--no-normalize-advantages" in refusal(minibatch_size=1)
    for changes in ({"normalize_advantages": False}, {"algorithm": "reinforce"}):
        assert pendulum.Config(minibatch_size=1, **changes).minibatch_size == 1
    config = small_config(minibatch_size=1, normalize_advantages=False, num_envs=1, total_steps=200, train_epochs=1)
    before = weights(pendulum.make_agent(config).actor)
    assert not np.array_equal(weights(pendulum.train(config, progress=False).agent.actor), before)


def test_the_schedule_ends_with_the_training():
    """學習率在最後一次更新降到 0：排程數的，和最佳化器數的，是同樣的更新。"""
    for changes in ({}, {"algorithm": "actor_critic"}, {"total_steps": 999, "minibatch_size": 150}):
        config = small_config(**changes)
        agent = pendulum.train(config, progress=False).agent
        assert agent.actor_optimizer.step[...] == agent.critic_optimizer.step[...] == config.updates


def test_bounds_are_what_a_machine_has():
    assert "更新" in refusal(total_steps=10**9, minibatch_size=2, train_epochs=1000)
    assert "GB" in refusal(num_envs=10_000, num_steps=10_000, total_steps=10**9)
    for name in ("total_steps", "num_envs", "num_steps", "train_epochs", "minibatch_size", "hidden_size"):
        assert refusal(**{name: 10**18}).startswith("--")
    for name in ("actor_learning_rate", "critic_learning_rate", "max_grad_norm", "reward_scale"):
        assert refusal(**{name: 0.0}).startswith("--" + name.replace("_", "-"))
        assert refusal(**{name: 1e30}).startswith("--" + name.replace("_", "-"))


@pytest.mark.parametrize(
    "extremes",
    [
        {"reward_scale": 1e6, "max_grad_norm": 1e9, "normalize_advantages": False, "sigma_bias": 10.0},
        {"reward_scale": 1e6, "algorithm": "ppo_kl", "beta": 1e6, "sigma_bias": -10.0},
    ],
)
def test_the_bounds_keep_every_number_finite(extremes):
    result = pendulum.train(small_config(**extremes), progress=False)
    assert np.isfinite(weights(result.agent.actor)).all()
    assert np.isfinite(weights(result.agent.critic)).all()


def test_weights_survive_saving_and_loading(tmp_path):
    agent, other = pendulum.make_agent(small_config(seed=1)), pendulum.make_agent(small_config(seed=2))
    lesson_extras.save_weights(tmp_path / "weights.npz", agent)
    assert not np.array_equal(weights(agent.actor), weights(other.actor))
    lesson_extras.load_weights(tmp_path / "weights.npz", other, "--watch")
    assert np.array_equal(weights(agent.actor), weights(other.actor))
    assert np.array_equal(weights(agent.critic), weights(other.critic))
    names = np.load(tmp_path / "weights.npz").files
    assert {"actor/body/fc1/kernel", "actor/mu/bias", "actor/sigma/bias", "critic/fc_out/kernel"} < set(names)


def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch):
    monkeypatch.setattr(pendulum, "learn", lambda *_: ((np.array([0.0, np.nan]), np.zeros(2)), 0.0))
    with pytest.raises(lesson.LessonError) as stopped:
        pendulum.train(small_config(), progress=False)
    assert stopped.value.args == ("第 400 步的損失不是有限的數；把學習率調小再試", 1)


def test_no_warning_while_the_packages_are_imported(tmp_path):
    """TFP 匯入時用了 JAX 將要移除的東西；-W default 也看不到。"""
    command = [sys.executable, "-W", "default::DeprecationWarning", str(script(LESSON)), "--help"]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0
    assert "tensorflow_probability" not in result.stderr
    assert "jax.core" not in result.stderr


def test_default_run_reaches_the_target_and_can_be_watched(call, tmp_path, monkeypatch):
    result = run(LESSON, "--out-dir out", tmp_path, environment())
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("達標：")
    assert result.stderr == ""
    recorded = metrics(tmp_path / "out")
    assert recorded["eval_mean"] >= pendulum.TARGET_RETURN
    assert recorded["eval_mean"] == pytest.approx(np.mean(recorded["eval_returns"]))
    assert len(recorded["eval_returns"]) == 100
    assert recorded["env_steps"] <= 100_000
    files = {"learning_curve.png", "clipped_objective.png", "agent.gif", "weights.npz", "metrics.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files

    monkeypatch.chdir(tmp_path)
    status, out, err = call(LESSON, "--watch out/weights.npz --out-dir watched")
    assert (status, err) == (0, "")
    assert out.startswith("沒有螢幕")
    assert (tmp_path / "watched" / "watch.gif").read_bytes() == (tmp_path / "out" / "agent.gif").read_bytes()
    (tmp_path / "broken.npz").write_bytes(b"not weights")
    for flags in ("--watch broken.npz", "--watch out/weights.npz --hidden-size 32"):
        status, _, err = call(LESSON, flags)
        assert status == 2, err
        assert err.startswith(f"錯誤：{flags.split(' --hidden')[0]} 讀不出這一課的權重")
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("num_steps", "total_steps"), [(100, 900), (350, 1_400)])
def test_the_curve_has_a_point_where_an_episode_ended(num_steps, total_steps):
    """一次收集是半個回合，或一個多：每一輪回合一個點，站在走完的那一步，不是收集完的那一步。"""
    sizes = {"num_steps": num_steps, "num_envs": 2, "total_steps": total_steps, "minibatch_size": 100}
    curve = pendulum.train(pendulum.Config(train_epochs=1, **sizes), progress=False).curve
    assert [step for step, _ in curve] == list(range(400, total_steps + 1, 400))
    assert len({value for _, value in curve}) == len(curve)
