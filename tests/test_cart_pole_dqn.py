"""第 2 課的數學對照獨立的算法，以及完整的預設執行。"""

import collections
import copy
import dataclasses
import importlib
import itertools
import json
import sys
import threading
import types
import warnings

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis.extra import numpy as hnp
from lessons import environment, load, metrics, run
from matplotlib.figure import Figure

dqn = load("2_Cart_Pole_DQN")
extras = dqn.extras
table_file = importlib.import_module("binned_table")
COLLECTING = dqn.ReplayBuffer, dqn.Collector, dqn.next_batches
finite = st.floats(-100, 100, width=32)


def small_config(**changes):
    """整個測試檔用同一種形狀的網路與批次，才不會一直重新編譯。"""
    small = {"num_envs": 3, "learning_starts": 200, "train_every": 100, "hidden_size": 8}
    small |= {"updates_per_train": 5, "batch_size": 16, "buffer_size": 400, "total_steps": 600}
    return dqn.Config(**(small | changes))


def flat(state):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state)])


def weights(network):
    return flat(dqn.nnx.state(network))


def random_batch(size=16, seed=0):
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(2, size, 4)).astype(np.float32)
    actions = rng.integers(2, size=size).astype(np.int32)
    terminated = rng.integers(2, size=size).astype(np.float32)
    return dqn.Transition(states[0], actions, np.ones(size, np.float32), states[1], terminated)


def column(buffer, name):
    """存進去的那幾筆 (還沒繞回來時)。"""
    return getattr(buffer.data, name)[: len(buffer)]


# TD 目標與損失


@given(hnp.arrays(np.float64, (6, 3), elements=finite), hnp.arrays(bool, 6), st.floats(0, 1))
def test_td_target_equals_the_definition_written_out(next_q, terminated, gamma):
    """終止不 bootstrap，其餘 bootstrap；截斷的那一步存成不終止，見 test_training_stores_terminations_only。"""
    rewards = np.arange(6.0)
    targets = dqn.td_target(rewards, terminated, next_q, gamma)
    for i in range(6):
        expected = rewards[i]
        if not terminated[i]:
            best = next_q[i][0]
            for value in next_q[i]:
                best = max(best, value)
            expected += gamma * best
        assert targets[i] == pytest.approx(expected)


def test_the_worked_example_of_the_readme():
    rewards, next_q = np.ones(3), np.array([[50.0, 40.0], [50.0, 40.0], [30.0, 60.0]])
    targets = dqn.td_target(rewards, np.array([0, 1, 0]), next_q, 0.99)
    np.testing.assert_allclose(targets, [50.5, 1.0, 60.4])


def test_training_stores_terminations_only():
    """撐到 500 步被截斷的那一步，不算終止。"""
    config = small_config(num_envs=1, epsilon_end=0.0, epsilon_steps=1, buffer_size=5_000)
    collector, buffer = dqn.Collector(config, np.random.default_rng(0)), dqn.ReplayBuffer(5_000)

    def balance(states):
        push_right = states @ np.array([0.1, 0.2, 1.0, 0.5])
        return np.stack([-push_right, push_right], axis=-1)

    agent = types.SimpleNamespace(q_function=lambda: balance)
    collector.states, _ = collector.envs.reset(seed=0)
    assert collector.collect(agent, buffer, 501) == 500.0
    assert list(collector.envs.return_queue) == [500.0]
    assert not column(buffer, "terminated").any()
    gap = np.abs(column(buffer, "next_state")[:-1] - column(buffer, "state")[1:]).max(axis=1)
    assert list(np.flatnonzero(gap > 1e-6)) == [499]  # 第 500 步之後換了回合；重置的那一步沒有存


def test_many_environments_do_not_report_the_shortest_episodes():
    """一百份一起開始，先走完的都是短的回合；亂走的平均回報大約是 22，曲線從頭到尾都不該偏低。"""
    config = small_config(num_envs=100, epsilon_end=1.0, buffer_size=20_000)
    collector, buffer = dqn.Collector(config, np.random.default_rng(0)), dqn.ReplayBuffer(20_000)
    agent = types.SimpleNamespace(q_function=lambda: lambda states: np.zeros((len(states), 2)))
    means = [collector.collect(agent, buffer, steps) for steps in range(1_000, 12_000, 500)]
    told = [mean for mean in means if not np.isnan(mean)]
    assert np.isnan(means[0])  # 還有環境一個回合都沒走完
    assert len(told) > len(means) / 2
    assert 16 < min(told) <= max(told) < 27


@pytest.mark.parametrize(("target_network", "double"), [(True, False), (False, False), (True, True)])
def test_train_step_follows_the_gradient_of_its_loss(target_network, double):
    """用一步 SGD 的位移得到梯度，對照有限差分；目標由獨立的 NumPy 程式算出。"""
    config = small_config(target_network=target_network, double=double, seed=3)
    agent, batch = dqn.DQNAgent(config), random_batch()
    agent.target_network = dqn.DQNAgent(small_config(seed=9)).online_network
    agent.optimizer = dqn.nnx.Optimizer(agent.online_network, dqn.optax.sgd(1.0), wrt=dqn.nnx.Param)
    structure, before = dqn.nnx.split(agent.online_network)

    next_network = agent.target_network if target_network else agent.online_network
    next_q, online_q = np.asarray(next_network(batch.next_state)), np.asarray(agent.online_network(batch.next_state))
    choice = online_q if double else next_q
    best = np.array([row[np.argmax(by)] for row, by in zip(next_q, choice, strict=True)])
    targets = batch.reward + config.gamma * np.where(batch.terminated, 0.0, best)
    leaves, tree = jax.tree.flatten(before)

    @jax.jit
    def loss(vector):
        pieces = jnp.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1])
        state = jax.tree.unflatten(tree, [p.reshape(x.shape) for p, x in zip(pieces, leaves, strict=True)])
        q = dqn.nnx.merge(structure, state)(batch.state)
        return jnp.mean((q[jnp.arange(16), batch.action] - targets) ** 2)

    vector = flat(before)
    reported, _ = agent.train_step(batch)
    assert reported == pytest.approx(float(loss(vector)), rel=1e-5)
    gradient = vector - weights(agent.online_network)
    for seed in range(3):
        direction = np.random.default_rng(seed).normal(size=vector.shape)
        direction /= np.linalg.norm(direction)
        slope = (float(loss(vector + 1e-2 * direction)) - float(loss(vector - 1e-2 * direction))) / 2e-2
        assert gradient @ direction == pytest.approx(slope, rel=0.02, abs=2e-3)


def test_loss_reports_the_largest_absolute_q():
    network, batch = dqn.DQNAgent(small_config()).online_network, random_batch()
    _, largest = dqn.dqn_loss(network, batch, jnp.zeros(16))
    assert largest == pytest.approx(np.abs(np.asarray(network(batch.state))).max())


# 目標網路


def test_synchronising_copies_and_does_not_alias():
    agent = dqn.DQNAgent(small_config())
    np.testing.assert_array_equal(weights(agent.online_network), weights(agent.target_network))
    first = weights(agent.target_network)
    agent.train_step(random_batch())
    np.testing.assert_array_equal(weights(agent.target_network), first)  # 訓練線上網路，目標網路不動
    assert not np.array_equal(weights(agent.online_network), first)
    agent.sync_target_network()
    second = weights(agent.online_network)
    np.testing.assert_array_equal(weights(agent.target_network), second)
    agent.train_step(random_batch(seed=1))
    np.testing.assert_array_equal(weights(agent.target_network), second)
    assert not np.array_equal(weights(agent.online_network), second)


def test_a_snapshot_keeps_the_weights_of_its_moment():
    agent, states = dqn.DQNAgent(small_config()), random_batch().state
    q_function = agent.q_function()
    before = np.asarray(q_function(states))
    np.testing.assert_allclose(before, agent.online_network(states), rtol=1e-5, atol=1e-6)
    agent.train_step(random_batch())
    np.testing.assert_array_equal(q_function(states), before)
    assert not np.array_equal(agent.q_function()(states), before)


def test_one_compiled_round_equals_its_updates_one_by_one():
    config = small_config()
    together, alone = dqn.DQNAgent(config), dqn.DQNAgent(config)
    batches = [random_batch(seed=i) for i in range(5)]
    _, (losses, largest) = dqn.learn(together, dqn.Transition(*map(np.stack, zip(*batches, strict=True))))
    expected = [alone.train_step(batch) for batch in batches]
    np.testing.assert_allclose(losses, [loss for loss, _ in expected], rtol=1e-4)
    np.testing.assert_allclose(largest, [q for _, q in expected], rtol=1e-4)
    np.testing.assert_allclose(weights(together.online_network), weights(alone.online_network), atol=1e-5)


@pytest.mark.parametrize("sync_every", [1, 3, 4])
def test_the_target_is_synchronised_every_few_rounds(sync_every):
    agent = dqn.train(small_config(sync_every=sync_every, early_stop=False), progress=False).agent
    same = np.array_equal(weights(agent.online_network), weights(agent.target_network))
    assert agent.optimizer.step[...] == 5 * 5  # 第 200、300、400、500、600 步各一輪，每輪 5 次更新
    assert same == (5 % sync_every == 0)


# 回放緩衝區


@given(st.integers(1, 9), st.lists(st.integers(0, 9), max_size=12), st.integers(0, 100))
def test_replay_buffer_is_a_deque_with_a_maximum_length(capacity, counts, seed):
    buffer, model, made = dqn.ReplayBuffer(capacity), collections.deque(maxlen=capacity), 0
    for count in counts:
        count = min(count, capacity)
        numbers = np.arange(made, made + count)
        made += count
        buffer.add(
            dqn.Transition(
                numbers[:, None] * np.ones(4), numbers % 2, numbers, -numbers[:, None] * np.ones(4), numbers % 3
            )
        )
        model.extend(numbers)
        assert len(buffer) == len(model)
        assert sorted(column(buffer, "reward")) == sorted(model)
        assert buffer.added == made
    if not model:
        return
    batch = buffer.sample((40, 5), np.random.default_rng(seed))
    assert batch.state.shape == (40, 5, 4)
    assert set(batch.reward.ravel()) <= set(model)  # 只抽得到存過、還沒被蓋掉的
    np.testing.assert_array_equal(batch.state[..., 0], batch.reward)  # 每筆經驗的欄位沒有錯開
    np.testing.assert_array_equal(batch.next_state[..., 3], -batch.reward)
    np.testing.assert_array_equal(batch.action, batch.reward % 2)
    np.testing.assert_array_equal(batch.terminated, batch.reward % 3)
    ordered = buffer.in_order(model[0], (len(model),))
    np.testing.assert_array_equal(ordered.reward, list(model))


def test_sampling_reaches_every_transition():
    buffer = dqn.ReplayBuffer(20)
    numbers = np.arange(20)
    buffer.add(dqn.Transition(np.zeros((20, 4)), numbers, numbers, np.zeros((20, 4)), numbers))
    drawn = buffer.sample((1000,), np.random.default_rng(0)).action
    assert np.bincount(drawn, minlength=20).min() > 25


@pytest.fixture
def no_learning(monkeypatch):
    """不編譯、不學習，只看流程；每次更新的損失與最大的 |Q| 都是 1。"""
    monkeypatch.setattr(dqn.nnx, "cached_partial", lambda *_: lambda batches: (None, (np.ones(5), np.ones(5))))


def test_without_replay_every_step_is_learnt_once_and_in_order(monkeypatch, no_learning):
    config = small_config(replay=False, early_stop=False, buffer_size=5_000)
    seen, buffers = [], []
    original = dqn.next_batches

    def record(buffer, due, config, rng):
        batches = original(buffer, due, config, rng)
        seen.append(batches.state.reshape(-1, 4))
        buffers.append(buffer)
        return batches

    monkeypatch.setattr(dqn, "next_batches", record)
    dqn.train(config, progress=False)
    learnt = np.concatenate(seen)
    np.testing.assert_array_equal(learnt, buffers[0].data.state[100 : 100 + len(learnt)])
    assert len(learnt) == 5 * config.train_every


# 收集


@pytest.mark.parametrize("num_envs", [1, 3])
def test_no_step_after_a_reset_enters_the_buffer(num_envs):
    """每一筆都用單一環境從同一個狀態重走一遍：下一個觀測、獎勵與終止都要相同。"""
    config = small_config(num_envs=num_envs, buffer_size=1_000)
    agent, buffer = dqn.DQNAgent(config), dqn.ReplayBuffer(1_000)
    collector = dqn.Collector(config, np.random.default_rng(0))
    for until in (150, 151, 300):  # 分幾次收集，接縫上也不能錯
        collector.collect(agent, buffer, until)
    assert 300 <= buffer.added < 300 + num_envs
    env = dqn.gym.make("CartPole-v1").unwrapped
    env.reset(seed=0)
    for i in range(len(buffer)):
        env.state, env.steps_beyond_terminated = column(buffer, "state")[i].astype(float), None
        observation, reward, terminated, *_ = env.step(int(column(buffer, "action")[i]))
        np.testing.assert_allclose(observation, column(buffer, "next_state")[i], atol=1e-5)
        assert reward == column(buffer, "reward")[i] == 1
        assert terminated == column(buffer, "terminated")[i]
    assert column(buffer, "terminated").sum() >= 3  # 真的經過了幾次重置


def test_copies_seeds_checks_and_evaluations_start_from_different_places():
    """一個亂數產生器抽出每一份環境的每一個起點；不同的種子、檢查與評估，用的是不同的產生器。"""
    starts = [
        dqn.make_envs(16).reset(seed=seed)[0] for seed in (0, 1, dqn.CHECK_SEED, dqn.EVAL_SEED, dqn.EVAL_SEED + 1)
    ]
    assert len(np.unique(np.concatenate(starts), axis=0)) == 5 * 16
    used = [*range(10), 42, *extras.lesson_extras.SEEDS]
    seeds = [first + seed for first in (0, dqn.CHECK_SEED, dqn.EVAL_SEED) for seed in used]
    assert len(set(seeds)) == len(seeds)


def test_epsilon_goes_from_one_to_its_end_and_stays():
    config = dqn.Config(epsilon_end=0.05, epsilon_steps=10_000)
    steps = (0, 2_500, 5_000, 10_000, 10_001, 99_999)
    values = [dqn.epsilon_at(step, config) for step in steps]
    assert values == pytest.approx([1.0, 0.7625, 0.525, 0.05, 0.05, 0.05])


@given(st.floats(0, 1), st.integers(1, 10**6), st.integers(0, 10**7))
def test_epsilon_never_leaves_its_bounds(end, length, step):
    config = dqn.Config(epsilon_end=end, epsilon_steps=length)
    assert end - 1e-12 <= dqn.epsilon_at(step, config) <= 1 + 1e-12


def test_select_action_explores_with_probability_epsilon():
    agent, rng = dqn.DQNAgent(small_config()), np.random.default_rng(0)
    states = rng.normal(size=(4000, 4)).astype(np.float32)
    best = np.asarray(agent.online_network(states)).argmax(axis=1)
    for epsilon in (0.0, 0.5, 1.0):
        actions = dqn.select_action(agent.q_function(), states, epsilon, rng)
        assert set(actions) <= {0, 1}
        assert np.mean(actions != best) == pytest.approx(epsilon / 2, abs=0.03)


# 評估與整個流程


@given(st.integers(1, 499), st.floats(0, 0.999))
@settings(max_examples=30)
def test_discounted_return_is_the_sum_of_its_rewards(length, gamma):
    expected = sum(gamma**k for k in range(length))
    assert extras.discounted_return(np.array([length]), gamma)[0] == pytest.approx(expected)
    assert extras.discounted_return(np.array([500]), gamma)[0] == pytest.approx(1 / (1 - gamma))


def test_evaluation_counts_one_episode_of_each_copy():
    """對照單一環境：同一個起點、同一個貪婪策略，一個回合走幾步。"""
    agent = dqn.DQNAgent(small_config(seed=1))
    returns, start_q = dqn.evaluate(agent, seed=5)
    states, _ = dqn.make_envs(100).reset(seed=5)
    np.testing.assert_allclose(start_q, np.asarray(agent.online_network(states)).max(axis=1), rtol=1e-5)
    q_function, env = agent.q_function(), dqn.gym.make("CartPole-v1").unwrapped
    for i in range(5):
        env.reset(seed=0)
        env.state, state, steps, done = states[i].astype(float), states[i], 0, False
        while not done and steps < 500:
            action = int(np.asarray(q_function(state[None])).argmax())
            state, _, done, *_ = env.step(action)
            steps += 1
        assert returns[i] == steps


def test_training_stops_when_every_episode_of_the_check_is_perfect(monkeypatch):
    monkeypatch.setattr(dqn, "CHECK_EVERY", 100)
    monkeypatch.setattr(dqn, "CHECK_GATE", 1.0)
    used = []

    def fake_evaluate(agent, seed):
        used.append((seed, weights(agent.online_network)))
        return np.full(100, 500.0 if len(used) == 4 else 499.9), None

    monkeypatch.setattr(dqn, "evaluate", fake_evaluate)
    result = dqn.train(small_config(seed=7), progress=False)
    assert result.criterion_met
    assert not result.interrupted
    assert [mean for _, mean in result.history.checks] == pytest.approx([499.9, 499.9, 499.9, 500.0])
    assert 400 <= result.env_steps < 600
    assert {seed for seed, _ in used} == {dqn.CHECK_SEED + 7}  # 與評估的起點 (EVAL_SEED) 不同
    np.testing.assert_array_equal(used[-1][1], weights(result.agent.online_network))  # 回傳的就是檢查過的權重
    used.clear()
    assert not dqn.train(small_config(early_stop=False), progress=False).history.checks


def test_a_stop_request_ends_training_between_two_rounds():
    stop = threading.Event()
    stop.set()
    result = dqn.train(small_config(), stop, progress=False)
    assert result.interrupted
    assert (result.env_steps, result.rounds) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "first", "last"),
    [
        ({"total_steps": 3_000}, 1_000, 3_000),
        ({"total_steps": 3_300}, 1_000, 3_300),  # 預算用完的那一步也是一個點
        ({"train_every": 4_096, "total_steps": 20_000}, 1_000, 20_000),
        ({"learning_starts": 10_000, "total_steps": 12_000}, 10_000, 12_000),
    ],
)
def test_every_point_stands_at_the_step_where_it_was_measured(changes, first, last, monkeypatch, no_learning):
    measured = {}
    collect = dqn.Collector.collect

    def record(collector, agent, buffer, until):
        mean_return = collect(collector, agent, buffer, until)
        measured[buffer.added] = mean_return
        return mean_return

    monkeypatch.setattr(dqn.Collector, "collect", record)
    config = dqn.Config(early_stop=False, hidden_size=8, **changes)
    history = dqn.train(config, progress=False).history
    steps = [step for step, _ in history.curve]
    assert history.curve == [(step, measured[step]) for step in steps]
    assert {step for step, _ in history.largest_q} <= set(steps)  # 上一個點以來沒有學習，就沒有 |Q| 可記
    assert all(after // 1_000 > before // 1_000 for before, after in itertools.pairwise([0, *steps[:-1]]))
    assert first <= steps[0] < first + config.num_envs
    assert last <= steps[-1] < last + config.num_envs


def test_every_variant_sets_every_switch_and_checks_itself():
    config = dqn.Config(compare=True)
    variants = extras.variants(config)
    switches = {
        name: tuple(getattr(variant, switch) for switch in extras.SWITCHES) for name, variant in variants.items()
    }
    assert switches == extras.VARIANTS
    assert len(set(switches.values())) == len(variants) == 5
    same = {"early_stop": False, "compare": False, "total_steps": 40_000}
    for name, variant in variants.items():
        changes = dict(zip(extras.SWITCHES, switches[name], strict=True))
        assert variant == dataclasses.replace(dqn.Config(), **same, **changes)
    with pytest.raises(ValueError, match=r"^--compare 的 no replay：--train-every 是 100；"):
        dqn.Config(compare=True, train_every=100)


def compare(monkeypatch, config, seeds, out_dir):
    monkeypatch.setattr(extras.lesson_extras, "SEEDS", seeds)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = dataclasses.replace(config, out_dir=out_dir)
        extras.compare(dqn.RUN, config, dqn.train, dqn.evaluate, dqn.EVAL_SEED, COLLECTING)
    return metrics(out_dir)["comparison"]


def test_compare_is_reproducible_from_its_rows(tmp_path, monkeypatch, no_learning):
    monkeypatch.setattr(dqn, "CURVE_EVERY", 200)
    rows = compare(monkeypatch, small_config(), range(2), tmp_path)
    assert list(rows) == list(extras.VARIANTS)
    assert all(len(row["eval_means"]) == 2 for row in rows.values())
    table = extras.comparison_table(json.loads(json.dumps(rows)))
    assert table == (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert table.count("\n") == 3 + len(extras.VARIANTS) + len(extras.BINS)  # 最後是還沒有訓練的網路與三張表
    for measured in itertools.chain(*rows["replay + target"]["tables"]):
        assert 1 <= measured["eval_mean"] <= 500
        assert 0 < measured["learnt_share"] < 1
    assert "tables" not in rows["double"]
    assert "nan" not in table
    assert (tmp_path / "comparison.png").stat().st_size > 0


def test_a_comparison_in_which_no_episode_ends_is_drawn_without_warnings(tmp_path, monkeypatch, no_learning):
    short = small_config(total_steps=10, learning_starts=10, train_every=10)
    rows = compare(monkeypatch, short, range(1), tmp_path)
    assert rows["double"]["curves"] == [[]]
    assert (tmp_path / "comparison.png").stat().st_size > 0


def test_a_training_cut_short_is_no_row(tmp_path):
    stop = threading.Event()
    stop.set()
    run_now = types.SimpleNamespace(stop=stop, require_learnt=lambda learnt: sys.exit(f"learnt: {learnt}"))
    config = small_config(out_dir=tmp_path)
    with pytest.raises(SystemExit, match="learnt: 0"):
        extras.compare(run_now, config, dqn.train, dqn.evaluate, dqn.EVAL_SEED, COLLECTING)
    assert not list(tmp_path.iterdir())


@given(hnp.arrays(np.float32, (5, 4), elements=st.floats(-5, 5, width=32)), st.sampled_from(table_file.BINS))
def test_cells_are_those_of_digitize(states, bins):
    """對照：每個維度各用 np.digitize 找第幾格；之外的是最外面的一格。"""
    table = table_file.BinnedTable(bins)
    columns = []
    for column, limit in zip(states.T, table_file.LIMITS, strict=True):
        inner = (np.arange(1, bins) / bins * 2 - 1) * limit
        assume(np.abs(column[:, None] - inner).min() > 1e-5)  # 剛好在格線上的，捨入說了算
        columns.append(np.digitize(column, inner))
    expected = sum(column * bins ** (3 - i) for i, column in enumerate(columns))
    np.testing.assert_array_equal(table.cells(states), expected)


def test_a_table_learns_like_a_loop_over_its_entries():
    """對照：一格一格地平均目標。目標來自凍結的那一份；沒有出現的格子一個都不動。"""
    table, batch, rng = table_file.BinnedTable(4), random_batch(size=64), np.random.default_rng(1)
    table.q, table.target = rng.normal(size=(2, 256, 2))
    expected, cells = table.q.copy(), table.cells(batch.state)
    targets = dqn.td_target(batch.reward, batch.terminated, table.target[table.cells(batch.next_state)], 0.9)
    assert len(set(zip(cells, batch.action, strict=True))) < 64  # 有重複的
    for cell, action in itertools.product(range(256), range(2)):
        if (same := (cells == cell) & (batch.action == action)).any():
            mean = targets[same].mean()
            expected[cell, action] += table_file.ALPHA * (mean - table.q[cell, action])
    table.learn(batch, 0.9)
    np.testing.assert_allclose(table.q, expected)


def test_a_table_is_trained_on_as_many_steps_and_updates(monkeypatch):
    """假的更新只數次數：每個學習階段的目標，是上一個階段學完的那一份。"""
    config, learnt = small_config(), []

    def learn(table, batch, gamma):
        learnt.append((len(batch.action), table.target[0, 0]))
        table.q[0, 0] += 1

    monkeypatch.setattr(table_file.BinnedTable, "learn", learn)
    buffer, rng = dqn.ReplayBuffer(config.buffer_size), np.random.default_rng(0)
    collector = dqn.Collector(config, rng)
    table_file.train_table(4, config, buffer, collector, dqn.next_batches, rng, threading.Event())
    result = dqn.train(config, progress=False)
    assert config.total_steps <= buffer.added < config.total_steps + config.num_envs
    updates = config.updates_per_train
    assert learnt == [(config.batch_size, i // updates * updates) for i in range(updates * result.rounds)]


def test_curves_with_different_steps_are_averaged_at_the_same_steps():
    axes = Figure().subplots()
    extras.draw_curves(axes, "x", [[[0, 0], [10, 20], [20, 40]], [[1, 4], [12, 48], [22, 88]]], "C0")
    steps, means = axes.lines[0].get_xydata().T
    assert (steps[0], steps[-1], len(steps)) == (1, 20, 3)
    np.testing.assert_allclose(means, 3 * steps)  # 兩條直線，斜率 2 與 4


def test_weights_survive_saving_and_loading(tmp_path):
    agent, other = dqn.DQNAgent(small_config(seed=1)), dqn.DQNAgent(small_config(seed=2))
    agent.train_step(random_batch())
    dqn.save_weights(tmp_path / "weights.npz", agent)
    assert not np.array_equal(weights(agent.online_network), weights(other.online_network))
    extras.lesson_extras.load_weights(tmp_path / "weights.npz", other, "--watch")
    for network in ("online_network", "target_network"):
        assert np.array_equal(weights(getattr(agent, network)), weights(getattr(other, network)))


def test_a_loss_that_is_not_finite_stops_the_run(call, tmp_path):
    status, _, err = call("2_Cart_Pole_DQN", f"--learning-rate 1e30 --total-steps 1200 --out-dir {tmp_path / 'out'}")
    assert status == 1
    assert err.startswith("錯誤：第 ")
    assert err.endswith(" 步的損失不是有限的數；把學習率調小再試\n")


def test_exploration_is_not_drawn_from_the_stream_of_the_starts(monkeypatch):
    """Gymnasium 的起點是 default_rng(seed) 的數字；探索與抽樣一個都不和它共用。"""
    drawn, collector = [], dqn.Collector

    def spy(config, rng):
        drawn.extend(copy.deepcopy(rng).random(100))
        return collector(config, rng)

    config = small_config(seed=3)
    monkeypatch.setattr(dqn, "Collector", spy)
    dqn.train(config, progress=False)
    stream = np.random.default_rng(3).random(100)
    starts, _ = dqn.make_envs(3).reset(seed=3)
    np.testing.assert_allclose(np.sort(starts.ravel()), np.sort(stream[:12] / 10 - 0.05), rtol=1e-5)
    assert not np.isin(drawn, stream).any()


def test_default_run_reaches_the_target_and_can_be_watched(call, tmp_path, monkeypatch):
    result = run("2_Cart_Pole_DQN", "--out-dir out", tmp_path, environment())
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(("達到停止條件：", "用完步數的預算："))
    assert result.stdout.splitlines()[-2].startswith("達標：")
    recorded = metrics(tmp_path / "out")
    assert recorded["eval_mean"] >= 475
    assert recorded["eval_mean"] == pytest.approx(np.mean(recorded["eval_returns"]))
    assert len(recorded["eval_returns"]) == 100
    assert recorded["env_steps"] < 100_000 + 16
    files = {"learning_curve.png", "q_values.png", "agent.gif", "weights.npz", "metrics.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files

    monkeypatch.chdir(tmp_path)
    status, out, err = call("2_Cart_Pole_DQN", "--watch out/weights.npz --out-dir watched")
    assert (status, err) == (0, "")
    assert out.startswith("沒有螢幕")
    assert (tmp_path / "watched" / "watch.gif").read_bytes() == (tmp_path / "out" / "agent.gif").read_bytes()
    (tmp_path / "broken.npz").write_bytes(b"not weights")
    for flags in ("--watch broken.npz", "--watch out/weights.npz --hidden-size 32"):
        status, _, err = call("2_Cart_Pole_DQN", flags)
        assert status == 2, err
        assert len(err.splitlines()) == 1
