"""第 3 課的數學對照獨立的算法，以及完整的預設執行。"""

import itertools
import math
import sys
import threading

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from lessons import load, metrics, run

pendulum = load("3_Pendulum")
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
    agent, buffer = pendulum.PPOAgent(config), pendulum.RolloutBuffer()
    envs, rng = pendulum.make_envs(config.num_envs), np.random.default_rng(0)
    states, _ = envs.reset(seed=0)
    next_states = pendulum.collect(agent, envs, states, buffer, config, rng)
    return agent, buffer, next_states


def test_select_action_bridges_numpy_and_jax():
    """動作、對數機率、價值都是 NumPy；對數機率與 SciPy 的常態分佈一致。"""
    agent = pendulum.PPOAgent(small_config(sigma_bias=0.3))
    states = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    actions, log_probs, values = agent.select_action(agent.freeze(), states, np.random.default_rng(1))
    assert all(type(x) is np.ndarray and x.shape == (50,) for x in (actions, log_probs, values))
    policy = agent.actor(states)
    expected = scipy.stats.norm(np.asarray(policy.mean()), np.asarray(policy.stddev())).logpdf(actions)
    np.testing.assert_allclose(log_probs, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(values, agent.critic(states), rtol=1e-5)


def test_truncation_bootstraps_from_the_true_last_observation():
    """每個回合 200 步：第 200 步的下一個觀測是回合真正的結尾，不是重置後的起點。"""
    config = small_config(num_steps=201, total_steps=402)
    agent, buffer, _ = collect_once(config)
    last, after = buffer.transitions[199], buffer.transitions[200]
    assert last.truncated.all()
    assert not last.terminated.any()
    assert np.abs(last.next_state - after.state).max() > 1e-3  # after.state 已經是新回合的起點
    for step, following in zip(buffer.transitions[:198], buffer.transitions[1:199], strict=True):
        np.testing.assert_array_equal(step.next_state, following.state)
    batch = buffer.calculate_advantages_and_returns(agent.critic, config)
    bootstrap = config.gamma * np.asarray(agent.critic(last.next_state))
    np.testing.assert_allclose(batch.returns[199], last.reward * config.reward_scale + bootstrap, rtol=1e-4, atol=1e-5)


def test_the_true_last_observation_follows_the_physics():
    """用單一環境從同一個狀態重走最後一步，得到同一個觀測。"""
    _, buffer, _ = collect_once(small_config())
    last = buffer.transitions[199]
    env = pendulum.gym.make("Pendulum-v1").unwrapped
    env.reset(seed=0)
    for i in range(2):
        cos, sin, speed = last.state[i].astype(float)
        env.state = np.array([math.atan2(sin, cos), speed])
        observation, *_ = env.step(last.action[i : i + 1])
        np.testing.assert_allclose(observation, last.next_state[i], atol=1e-5)


def test_clear_empties_the_buffer():
    _, buffer, _ = collect_once(small_config())
    assert len(buffer.transitions) == 200
    buffer.clear()
    assert buffer.transitions == []


def test_each_rung_of_the_staircase_turns_one_switch():
    rungs = list(pendulum.ALGORITHMS.values())
    switches = ("critic", "gae", "reuse", "lock")
    for below, above in [*itertools.pairwise(rungs[:5]), (rungs[3], rungs[5])]:
        assert sum(getattr(below, name) != getattr(above, name) for name in switches) == 1


def flat(state):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state)])


def weights(module):
    return flat(pendulum.nnx.state(module))


def after_two_steps(algorithm, **changes):
    """同一批資料、同一個起點，更新兩次之後的智慧體 (第二次的比例已經不是 1)。"""
    config = small_config(algorithm, actor_learning_rate=0.05, num_envs=1, total_steps=200, **changes)
    agent, buffer, _ = collect_once(config)
    batch = buffer.calculate_advantages_and_returns(agent.critic, config)
    batch = batch._replace(old_policy=agent.actor(batch.states))
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


def test_only_reinforce_has_no_critic():
    for name, algorithm in pendulum.ALGORITHMS.items():
        agent = after_two_steps(name)
        learned = not np.array_equal(weights(agent.critic), weights(pendulum.PPOAgent(small_config()).critic))
        assert learned == algorithm.critic == (name != "reinforce")


@pytest.mark.parametrize(("algorithm", "epochs"), [("actor_critic", 1), ("ppo_clip", 3)])
def test_reuse_decides_how_often_the_data_is_learnt(algorithm, epochs):
    agent = pendulum.train(small_config(algorithm, train_epochs=3), progress=False).agent
    assert agent.actor_optimizer.step[...] == epochs * (400 // 128)


@pytest.mark.parametrize("algorithm", pendulum.ALGORITHMS)
def test_every_objective_starts_as_the_policy_gradient(algorithm):
    """ratio = 1 時，每一種目標的梯度都是 平均(∇ log π · 分數)：鎖只管走多遠。見 4.2。"""
    agent, buffer, _ = collect_once(small_config(algorithm, normalize_advantages=False))
    batch = buffer.calculate_advantages_and_returns(agent.critic, small_config(algorithm))
    batch = batch._replace(old_policy=agent.actor(batch.states))

    def policy_gradient(actor):
        return jnp.mean(actor(batch.states).log_prob(batch.actions) * batch.advantages)

    objective = flat(pendulum.nnx.grad(lambda actor: agent.actor_objective(actor, batch))(agent.actor))
    np.testing.assert_allclose(objective, flat(pendulum.nnx.grad(policy_gradient)(agent.actor)), rtol=1e-3, atol=1e-5)
    assert np.abs(objective).max() > 0


def test_an_update_raises_the_objective():
    """正負號：更新之後，同一批資料上的目標要變大，評論家的誤差要變小。"""
    agent, buffer, _ = collect_once(small_config("actor_critic"))
    batch = buffer.calculate_advantages_and_returns(agent.critic, small_config("actor_critic"))
    before = agent.actor_objective(agent.actor, batch), np.mean((agent.critic(batch.states) - batch.returns) ** 2)
    agent.train_step(batch)
    assert agent.actor_objective(agent.actor, batch) > before[0]
    assert np.mean((agent.critic(batch.states) - batch.returns) ** 2) < before[1]


def test_outside_share_counts_ratios_beyond_the_bounds():
    config = small_config(train_epochs=10, actor_learning_rate=0.05, total_steps=400)
    agent, buffer, _ = collect_once(config)
    batch = buffer.calculate_advantages_and_returns(agent.critic, config)
    samples = jax.tree.map(lambda x: np.reshape(x, (400, *x.shape[2:])), batch)
    _, outside = pendulum.learn(agent, samples, np.arange(384).reshape(-1, 64))
    ratio = np.exp(np.asarray(agent.actor(samples.states).log_prob(samples.actions)) - samples.log_probs)
    assert float(outside) == pytest.approx(np.mean((ratio < 0.8) | (ratio > 1.2)), abs=2 / 400)
    assert outside > 0


def test_evaluation_starts_cover_every_cell_once():
    starts = pendulum.evaluation_starts()
    cells = np.floor((starts / [np.pi, 1.0] + 1) * 5).astype(int)
    assert sorted(map(tuple, cells)) == [(i, j) for i in range(10) for j in range(10)]


def test_evaluation_plays_the_mean_action_from_those_starts():
    """用單一環境重走三個回合，回報要和 evaluate 的同一個位置相同。"""
    agent = pendulum.PPOAgent(small_config())
    returns = pendulum.evaluate(agent)
    assert returns.shape == (100,)
    env = pendulum.gym.make("Pendulum-v1")
    for i in (0, 37, 99):
        env.reset(seed=1)
        env.unwrapped.state = pendulum.evaluation_starts()[i]
        state, total = env.unwrapped._get_obs(), 0.0
        for _ in range(200):
            state, reward, _, truncated, _ = env.step(np.asarray(agent.actor(state[None]).mean()))
            total += reward
        assert truncated
        assert total == pytest.approx(returns[i], rel=1e-3)


def test_gradient_variances_follow_the_definition(monkeypatch):
    """回合各算各的梯度，再取變異數，與 NumPy 的定義相同；後四種演算法的分數一樣。"""
    config = small_config(train_epochs=1, hidden_size=4)
    variances = pendulum.gradient_variances(config, threading.Event(), rollouts=2)
    agent = pendulum.train(
        pendulum.replace(config, total_steps=config.total_steps // 4), threading.Event(), progress=False
    ).agent
    envs, buffer, rng = pendulum.make_envs(2), pendulum.RolloutBuffer(), np.random.default_rng(config.seed)
    states, _ = envs.reset(seed=config.seed)
    gradients = []
    for _ in range(2):
        states = pendulum.collect(agent, envs, states, buffer, config, rng)
        batch = buffer.calculate_advantages_and_returns(agent.critic, small_config("reinforce"))
        buffer.clear()
        for env in range(2):

            def episode(actor, batch=batch, env=env):
                return jnp.mean(actor(batch.states[:, env]).log_prob(batch.actions[:, env]) * batch.advantages[:, env])

            gradients.append(flat(pendulum.nnx.grad(episode)(agent.actor)))
    assert variances["reinforce"] == pytest.approx(np.var(gradients, axis=0, ddof=1).sum(), rel=1e-3)
    assert len({variances[name] for name in ("actor_critic", "ppo_unclipped", "ppo_clip", "ppo_kl")}) == 1
    assert variances["reinforce"] > variances["reinforce_baseline"] > variances["actor_critic"] > 0


def run_main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["pendulum.py", *flags])
    pendulum.main()


TINY = ["--total-steps", "400", "--num-envs", "2", "--train-epochs", "1", "--hidden-size", "4"]


def test_compare_leaves_figures_a_table_and_numbers(monkeypatch, tmp_path, capsys):
    """每種演算法怎麼訓練另有測試；這裡只訓練一次，看 compare 怎麼收集、畫圖、存檔。"""
    result = pendulum.train(small_config(train_epochs=1, hidden_size=4), progress=False)
    monkeypatch.setattr(pendulum, "COMPARE_SEEDS", 2)
    monkeypatch.setattr(pendulum, "train", lambda *args, **kwargs: result)
    monkeypatch.setattr(pendulum, "evaluate", lambda agent: np.array([-100.0, -300.0]))
    run_main(monkeypatch, "--compare", *TINY, "--out-dir", str(tmp_path))
    rows = metrics(tmp_path)["comparison"]
    assert list(rows) == [*pendulum.ALGORITHMS, "notes"]
    assert all(row["eval_means"] == [-200.0, -200.0] and len(row["curves"]) == 2 for row in rows.values())
    table = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert table == pendulum.comparison_table(rows)
    assert table in capsys.readouterr().out
    for name in ("comparison.png", "notes_settings.png"):
        assert (tmp_path / name).stat().st_size > 0


def test_an_interrupted_comparison_keeps_what_is_done(monkeypatch, tmp_path, capsys):
    """第三次訓練時按下 Ctrl-C：前兩種演算法的結果留著。"""
    result, stop, calls = pendulum.train(small_config(train_epochs=1), progress=False), threading.Event(), []

    def train(config, stop, progress=True):
        calls.append(config.algorithm)
        if len(calls) == 4:  # 第一次是 gradient_variances 的
            stop.set()
        return result

    monkeypatch.setattr(pendulum, "stop_on_ctrl_c", lambda: stop)
    monkeypatch.setattr(pendulum, "train", train)
    monkeypatch.setattr(pendulum, "evaluate", lambda agent: np.array([-100.0]))
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, "--compare", *TINY, "--out-dir", str(tmp_path))
    assert stopped.value.code == 130
    assert list(metrics(tmp_path)["comparison"]) == ["reinforce", "reinforce_baseline"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("已中斷：完成 2 次訓練")


def test_weights_survive_saving_and_loading(tmp_path):
    agent, other = pendulum.PPOAgent(small_config(seed=1)), pendulum.PPOAgent(small_config(seed=2))
    pendulum.save_weights(agent, tmp_path / "weights.npz")
    assert not np.array_equal(weights(agent.actor), weights(other.actor))
    pendulum.load_weights(other, tmp_path / "weights.npz")
    assert np.array_equal(weights(agent.actor), weights(other.actor))
    assert np.array_equal(weights(agent.critic), weights(other.critic))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    result = run("3_Pendulum", "--total-steps 400 --num-envs 2 --reward-scale 1e30 --out-dir out", tmp_path)
    assert result.returncode == 1
    assert result.stderr == "錯誤：第 400 步的損失不是有限的數；把學習率調小再試\n"


def test_default_run_reaches_the_target_and_can_be_watched(tmp_path):
    result = run("3_Pendulum", "--out-dir out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("達標：")
    recorded = metrics(tmp_path / "out")
    assert recorded["eval_mean"] >= pendulum.TARGET_RETURN
    assert recorded["eval_mean"] == pytest.approx(np.mean(recorded["eval_returns"]))
    assert len(recorded["eval_returns"]) == 100
    assert recorded["env_steps"] <= 100_000
    files = {"learning_curve.png", "clipped_objective.png", "agent.gif", "weights.npz", "metrics.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files

    watched = run("3_Pendulum", "--watch out/weights.npz --out-dir watched", tmp_path)
    assert watched.returncode == 0, watched.stderr
    assert (tmp_path / "watched" / "agent.gif").read_bytes() == (tmp_path / "out" / "agent.gif").read_bytes()
    (tmp_path / "broken.npz").write_bytes(b"not weights")
    for flags in ("--watch broken.npz", "--watch out/weights.npz --hidden-size 32"):
        refused = run("3_Pendulum", flags, tmp_path)
        assert refused.returncode == 2, refused.stderr
        assert len(refused.stderr.splitlines()) == 1
