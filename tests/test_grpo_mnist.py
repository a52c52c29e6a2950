"""第 4 課的數學對照獨立的算法，資料對照原始檔案，以及完整的預設執行。"""

import functools
import gzip
import hashlib
import inspect
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import lessons
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from lessons import ROOT, load, metrics, run

grpo = load("4_GRPO_MNIST")
extras, mnist, lesson = grpo.extras, grpo.mnist, grpo.lesson
nnx = grpo.nnx
shapes = st.sampled_from([(1, 1), (4, 3), (7, 1), (1, 6), (16, 8)])  # 每種形狀都要編譯一次，所以只有幾種
rewards_arrays = shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=st.sampled_from([0.0, 1.0])))
logits_arrays = hnp.arrays(np.float32, (2, 10), elements=st.floats(-4, 4, width=32))


def advantages_of(rewards, group):
    rewards = jnp.asarray(rewards)
    return np.asarray(grpo.relative_advantages(rewards, grpo.group_baseline(rewards, group), group))


@given(rewards_arrays, st.sampled_from(["batch", "image"]))
def test_advantages_equal_a_loop(rewards, group):
    """每組：平均 0、變異數 1；全對或全錯的組是 0，永遠不是 NaN。"""
    advantages = advantages_of(rewards, group)
    groups = [np.arange(rewards.size)] if group == "batch" else list(np.arange(rewards.size).reshape(rewards.shape).T)
    for members in groups:
        own, result = rewards.ravel()[members].astype(float), advantages.ravel()[members]
        if len(set(own)) == 1:
            assert (result == 0).all()
            continue
        mean = sum(own) / len(own)
        deviation = math.sqrt(sum((reward - mean) ** 2 for reward in own) / len(own))
        np.testing.assert_allclose(result, [(reward - mean) / deviation for reward in own], rtol=1e-4)
        assert result.sum() == pytest.approx(0, abs=1e-4)
        assert result.var() == pytest.approx(1, rel=1e-4)


def test_degenerate_groups_are_silent_in_spite_of_rounding():
    """平均會捨入：例如 0.7 加 3 次除以 3 不一定是 0.7。除以 1e-8 那麼小的標準差會把它放大成 ±1。"""
    for value in (1.0, 0.7, 0.0):
        for size in (3, 41, 49):
            for group in ("image", "batch"):
                assert (advantages_of(np.full((size, 1), value, np.float32), group) == 0).all()


def test_the_worked_example_of_the_readme():
    """README「手算」：四張圖片各兩個答案。"""
    rewards = [[1, 1, 0, 1], [1, 0, 0, 1]]
    batch, image = advantages_of(np.float32(rewards), "batch"), advantages_of(np.float32(rewards), "image")
    np.testing.assert_allclose(batch[0], [0.7746, 0.7746, -1.2910, 0.7746], atol=1e-4)
    np.testing.assert_allclose(image, [[0, 1, 0, 0], [0, -1, 0, 0]], atol=1e-6)


@given(hnp.arrays(np.float64, 10, elements=st.floats(-2, 2)), st.integers(0, 9))
def test_the_own_reward_in_the_group_mean_only_scales_the_gradient(logits, label):
    """兩個答案的 100 種組合全部算過：期望的梯度是正確的策略梯度的 1 - 1/2 倍。"""
    policy, reward = scipy.special.softmax(logits), np.eye(10)[label]
    score = np.eye(10) - policy  # 每個動作的 ∇ log π (對 logits)
    expected, pairs = np.zeros(10), np.argwhere(np.ones((10, 10)))
    rewards = jnp.asarray(reward[pairs.T])  # (2, 100)：一欄一種組合
    advantages = np.asarray(rewards - grpo.group_baseline(rewards, "image"))
    for (first, second), (a, b) in zip(pairs, advantages.T, strict=True):
        expected += policy[first] * policy[second] * (a * score[first] + b * score[second]) / 2
    np.testing.assert_allclose(expected, 0.5 * (policy * reward) @ score, atol=1e-6)


def test_normalising_twice_hides_any_baseline():
    """筆記先減基線再標準化；再減一次平均，減掉的是什麼都沒有差別。這裡的優勢不會這樣。"""
    rewards = jnp.array([[1.0, 0.0, 0.0, 1.0, 1.0]])

    def notes(baseline):
        advantages = rewards - baseline
        return (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    np.testing.assert_allclose(notes(0.1), notes(0.9), atol=1e-5)
    ours = [grpo.relative_advantages(rewards, jnp.float32(baseline), "batch") for baseline in (0.1, 0.9)]
    np.testing.assert_allclose(ours[0] - ours[1], 0.8 / np.std([1, 0, 0, 1, 1]), rtol=1e-5)


def test_the_clipped_objective_is_that_of_lesson_3():
    assert inspect.getsource(grpo.clipped_objective) == inspect.getsource(load("3_Pendulum").clipped_objective)


@given(logits_arrays)
def test_kl_estimate_is_not_negative_and_its_mean_is_the_kl(logits):
    """對十個動作取期望值，就是兩個 Categorical 的 KL 散度。"""
    policy, reference = (scipy.special.log_softmax(row.astype(float)) for row in logits)
    estimates = np.asarray(grpo.kl_estimate(jnp.float32(policy), jnp.float32(reference)))
    assert (estimates >= -1e-6).all()
    exact = scipy.stats.entropy(np.exp(policy), np.exp(reference))
    assert np.exp(policy) @ estimates == pytest.approx(exact, rel=1e-3, abs=1e-5)


@given(logits_arrays)
@settings(max_examples=20)
def test_the_gradient_of_the_kl_estimate_is_that_of_the_other_direction(logits):
    """README「KL」：值是 KL(π ‖ π_ref)，期望的梯度是 KL(π_ref ‖ π) 的：softmax(logits) - π_ref。"""
    logits, reference = jnp.asarray(logits[0]), jax.nn.log_softmax(jnp.asarray(logits[1]))

    def estimate(logits):
        log_probs = jax.nn.log_softmax(logits)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(log_probs)) * grpo.kl_estimate(log_probs, reference))

    expected = jax.nn.softmax(logits) - jnp.exp(reference)
    np.testing.assert_allclose(jax.grad(estimate)(logits), expected, atol=1e-4)


def flat(state):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state)])


def weights(module):
    return flat(nnx.state(module, nnx.Param))


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.float32(rng.random((count, 784))), jnp.uint8(rng.integers(10, size=count))


def make_agent(**settings):
    return grpo.make_agent(grpo.Config(**settings), grpo.TRAIN_IMAGES)


@nnx.jit
def rollout(agent, states, labels):
    return agent.rollout(states, labels)


@nnx.jit
def train_actor(agent, batch):
    return agent.train_actor(batch)


def objective_gradient(agent, batch):
    return flat(nnx.jit(nnx.grad(lambda actor: agent.actor_objective(actor, batch)[0]))(agent.actor))


def test_select_actions_and_log_probs_follows_the_policy():
    agent = make_agent()
    agent.group_size = 5000  # 比 --group-size 的上限多，機率才量得準
    states, _ = images(3)
    actions, log_probs = agent.select_actions_and_log_probs(states)
    assert actions.shape == log_probs.shape == (5000, 3)
    expected = scipy.special.log_softmax(np.asarray(agent.actor(states).logits), axis=1)
    for i in range(3):
        np.testing.assert_allclose(log_probs[:, i], expected[i, actions[:, i]], rtol=1e-4)
        np.testing.assert_allclose(np.bincount(actions[:, i], minlength=10) / 5000, np.exp(expected[i]), atol=0.03)
    again, _ = agent.select_actions_and_log_probs(states)
    assert not np.array_equal(actions, again)  # 每次採樣用新的亂數


def test_rewards():
    rewards = grpo.calculate_rewards(jnp.array([[3, 1], [2, 2]]), jnp.array([3, 2], jnp.uint8))
    np.testing.assert_array_equal(rewards, [[1, 0], [0, 1]])


@pytest.mark.parametrize("group", ["batch", "image"])
def test_a_large_group_points_along_the_exact_policy_gradient(group):
    """對全部十個動作算的策略梯度：Σ_a π(a|s) ∇log π(a|s) r = ∇π(答案|s)，除以群組的標準差。"""
    states, labels = images(4)
    agent = make_agent(group=group)
    agent.group_size = 20_000

    def expected_reward(actor):
        p = jnp.exp(actor(states).log_prob(labels))
        group_p = p if group == "image" else p.mean()
        return jnp.mean(p / jax.lax.stop_gradient(jnp.sqrt(group_p * (1 - group_p))))

    exact = flat(nnx.grad(expected_reward)(agent.actor))
    sampled = objective_gradient(agent, rollout(agent, states, labels))
    cosine = exact @ sampled / np.linalg.norm(exact) / np.linalg.norm(sampled)
    assert cosine > 0.98
    assert np.linalg.norm(sampled) == pytest.approx(np.linalg.norm(exact), rel=0.1)


def test_updates_raise_the_expected_reward():
    states, labels = images(32)
    agent = make_agent(learning_rate=1e-4)
    before = np.exp(agent.actor(states).log_prob(labels)).mean()
    train_actor(agent, rollout(agent, states, labels))
    assert np.exp(agent.actor(states).log_prob(labels)).mean() > before


def test_with_one_pass_the_clip_does_nothing():
    """K = 1：比例全是 1，裁剪與不裁剪的梯度相同；更新之後再學一遍，就不同了。"""
    states, labels = images(32)
    agent = make_agent()
    tight = make_agent(clip_epsilon=0.001)
    batch = rollout(agent, states, labels)

    def unclipped(actor):
        return jnp.mean(jnp.exp(actor(states).log_prob(batch.actions) - batch.log_probs) * batch.advantages)

    def gradients():
        nnx.update(tight.actor, nnx.state(agent.actor))
        return objective_gradient(tight, batch), flat(nnx.jit(nnx.grad(unclipped))(agent.actor))

    np.testing.assert_allclose(*gradients(), atol=1e-5)
    assert np.abs(gradients()[1]).max() > 1e-3
    _, clip_fraction = train_actor(agent, batch)
    assert clip_fraction == 0
    assert np.abs(np.subtract(*gradients())).max() > 1e-3
    _, clip_fraction = train_actor(agent, batch)
    assert clip_fraction > 0


def test_the_moving_average_is_used_before_it_is_updated():
    agent = make_agent(baseline="moving-average")
    states, labels = images(32)
    average = 0.0
    for _ in range(3):
        batch = rollout(agent, states, labels)
        assert float(batch.baseline) == pytest.approx(average)
        average = 0.9 * average + 0.1 * float(batch.rewards.mean())
    deviation = np.std(batch.rewards)
    np.testing.assert_allclose(batch.advantages, (batch.rewards - batch.baseline) / deviation, rtol=1e-4)


def test_only_ppo_has_a_critic_and_it_learns_the_reward():
    agent = make_agent(algorithm="ppo", learning_rate=1e-4)
    states, labels = images(32)
    batch = rollout(agent, states, labels)
    np.testing.assert_allclose(batch.baseline, agent.critic(states), rtol=1e-5)
    residual = batch.rewards - batch.baseline
    np.testing.assert_allclose(batch.advantages, residual / np.std(residual), rtol=1e-4)
    train_actor(agent, batch)
    assert np.mean((agent.critic(states) - batch.rewards) ** 2) < np.mean(residual**2)
    assert make_agent().critic is None


def test_supervised_learning_uses_the_labels_only():
    """更新一次的方向是交叉熵的梯度，與採樣的答案無關。"""
    states, labels = images(32)
    agents = [make_agent(algorithm="supervised") for _ in range(2)]
    batch = rollout(agents[0], states, labels)
    loss, _ = train_actor(agents[0], batch)
    logits = np.asarray(agents[1].actor(states).logits)
    assert float(loss) == pytest.approx(-scipy.special.log_softmax(logits, axis=1)[range(32), labels].mean(), rel=1e-5)
    train_actor(agents[1], batch._replace(actions=9 - batch.actions, advantages=-batch.advantages))
    np.testing.assert_array_equal(weights(agents[0].actor), weights(agents[1].actor))


def test_beta_pulls_towards_a_frozen_reference():
    """β 很大時，一步都走不遠；參考模型自己不動。"""
    states, labels = images(32)
    moved = []
    for beta in (1e-9, 1e4):
        agent = make_agent(beta=beta, learning_rate=0.003, anneal_learning_rate=False)
        start = weights(agent.reference)
        np.testing.assert_array_equal(start, weights(agent.actor))
        for _ in range(10):
            batch = rollout(agent, states, labels)
            train_actor(agent, batch)
        np.testing.assert_array_equal(weights(agent.reference), start)
        reference = agent.reference(states).log_prob(batch.actions)
        np.testing.assert_allclose(batch.reference_log_probs, reference, rtol=1e-5)
        moved.append(float(grpo.tfd.kl_divergence(agent.actor(states), agent.reference(states)).mean()))
    assert moved[1] < moved[0] / 3
    assert make_agent().reference is None


def test_bytes_are_those_of_the_arrays():
    """參數 784·128 + 128 + 128·128 + 128 + 128·10 + 10，一個 4 位元組；評論家的輸出層只有 129 個。"""
    actor = 4 * (784 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10)
    critic = actor - 4 * (129 * 9)
    expected = {"parameters": actor, "gradients": actor, "moments": 2 * actor, "reference": 0}
    assert extras.memory_bytes(make_agent()) == expected
    assert extras.memory_bytes(make_agent(beta=1.0))["reference"] == actor
    ppo = extras.memory_bytes(make_agent(algorithm="ppo"))
    assert ppo == {name: size // actor * (actor + critic) for name, size in expected.items()}


# 資料 ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data():
    return mnist.load(grpo.DATA_DIR)


def test_the_checksums_are_the_published_ones():
    """資料的 README 列的，就是程式核對的。"""
    text = (ROOT / "4_GRPO_MNIST/data/mnist_packed/README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"\| `([\w-]+)` \| `([0-9a-f]{64})` \|", text))
    names = {"train": "train", "test": "t10k", "images": "images-idx3-ubyte", "labels": "labels-idx1-ubyte"}
    assert listed == {f"{names[split]}-{names[key]}": digest for (split, key), digest in mnist.SHA256.items()}


def test_rebuilding_the_data_set_gives_the_same_files(data, tmp_path):
    """從讀到的陣列還原四個原始檔案，核對雜湊值，再用 TFDS 的 builder 做一次，比較每一筆紀錄。

    array_record 由幾個執行緒寫出，檔案的位元組每次可能不同；讀回來的紀錄與說明檔要完全相同。
    """
    originals, folder = tmp_path / "originals", ROOT / "4_GRPO_MNIST/data/mnist_packed"
    originals.mkdir()
    for split, name in (("train", "train"), ("test", "t10k")):
        arrays = getattr(data, split)
        count = len(arrays.labels)
        headers = {"images": ("idx3", [2051, count, 28, 28]), "labels": ("idx1", [2049, count])}
        for key, (kind, header) in headers.items():
            content = np.array(header, ">u4").tobytes() + np.asarray(getattr(arrays, key)).tobytes()
            assert hashlib.sha256(content).hexdigest() == mnist.SHA256[split, key]
            (originals / f"{name}-{key}-{kind}-ubyte.gz").write_bytes(gzip.compress(content, compresslevel=1))
    command = [sys.executable, "-B", str(folder / "mnist_packed_dataset_builder.py"), str(originals), str(tmp_path)]
    subprocess.run(command, env=lessons.environment(), check=True, capture_output=True)
    rebuilt, committed = tmp_path / "mnist_packed" / "1.0.0", folder / "1.0.0"
    assert {path.name for path in rebuilt.iterdir()} == {path.name for path in committed.iterdir()}
    for name in ("dataset_info.json", "features.json", "LICENSE"):
        assert (rebuilt / name).read_bytes() == (committed / name).read_bytes()
    for split in ("train", "test"):
        for array, expected in zip(mnist.read_split(rebuilt, split), getattr(data, split), strict=True):
            np.testing.assert_array_equal(array, expected)
    assert sum(path.stat().st_size for path in committed.iterdir()) < 12_500_000


def damage(path, how):
    """missing、folder、cut、one bit，或換成的內容。"""
    content = path.read_bytes()
    if how in ("missing", "folder"):
        path.unlink()
        if how == "folder":
            path.mkdir()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "one bit":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.write_bytes(how)


RECORDS, INFO, FEATURES = "mnist_packed-train.array_record-00000-of-00001", "dataset_info.json", "features.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9961472\n"
DAMAGES = [
    *((RECORDS, how) for how in ("missing", "folder", "cut", "one bit", b"", LFS_POINTER, b"x" * 200_000)),
    *((INFO, how) for how in ("missing", "folder", "cut", b"", b"{}", b"[1, 2]", b"\xff\xfe")),
    *((FEATURES, how) for how in ("missing", "folder", "cut", b"", b"{}", b"[1, 2]", b"\xff\xfe")),
]


def refusal(folder) -> str:
    with pytest.raises(lesson.LessonError) as refused:
        mnist.load(folder)
    sentence, status = refused.value.args
    assert status == 2
    assert "\n" not in sentence
    assert sentence.startswith(f"讀不出 {folder} 裡的 MNIST (")
    assert "git checkout" in sentence
    return sentence


@pytest.mark.parametrize(("file", "how"), DAMAGES)
def test_damaged_data_is_refused_in_one_sentence(file, how, tmp_path, capfd):
    broken = shutil.copytree(grpo.DATA_DIR, tmp_path / "1.0.0")
    damage(broken / file, how)
    refusal(broken)
    assert capfd.readouterr() == ("", "")


def test_data_that_is_not_there_or_not_mnist_is_refused(tmp_path):
    refusal(tmp_path / "nowhere")
    (tmp_path / "a_file").touch()
    refusal(tmp_path / "a_file")
    swapped = shutil.copytree(grpo.DATA_DIR, tmp_path / "swapped")
    shutil.copy(swapped / RECORDS.replace("train", "test"), swapped / RECORDS)
    refusal(swapped)
    unknown = shutil.copytree(grpo.DATA_DIR, tmp_path / "unknown")
    damage(unknown / FEATURES, (unknown / FEATURES).read_bytes().replace(b"uint8", b"uint9"))
    assert "型別" in refusal(unknown)  # TFDS 去找 TensorFlow；要怪的是檔案，不是少裝的套件


def test_other_records_do_not_have_the_published_hash(data, monkeypatch):
    def swap(data_dir, split):
        return {
            "images": np.asarray(data.train.images).reshape(-1, 28, 28),
            "labels": np.asarray(data.train.labels)[::-1],
        }

    monkeypatch.setattr(mnist, "read_records", swap)
    assert "雜湊值不符" in refusal(grpo.DATA_DIR)


@pytest.mark.parametrize("bug", [TypeError("bug"), AttributeError("bug"), ModuleNotFoundError("bug", name="x")])
def test_a_bug_is_not_answered_with_git_checkout(bug, monkeypatch):
    def broken(*_):
        raise bug

    monkeypatch.setattr(mnist.tfds, "builder_from_directory", broken)
    with pytest.raises(type(bug), match="bug"):
        mnist.load(grpo.DATA_DIR)


def run_a_copy(tmp_path, **environment):
    """複製走的第 4 課，沒有資料，家目錄也寫不進去；只說一句話：TFP 與 Matplotlib 的警告，讀者管不著的，都看不到。"""
    folder = lessons.script("4_GRPO_MNIST").parent
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("data", "outputs", "__pycache__", ".*"))
    command = [sys.executable, "-W", "default::DeprecationWarning", str(tmp_path / "copy" / "grpo_mnist.py")]
    environment = lessons.environment() | {"HOME": "/dev/null/home"} | environment
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    return line


def test_a_copied_lesson_without_data_says_how_to_restore_it(tmp_path):
    assert run_a_copy(tmp_path).startswith("錯誤：讀不出 ")


def test_without_array_record_the_platforms_are_named(tmp_path):
    """Windows 與 Intel 的 Mac：TFDS 裝得起來，array_record 沒有。"""
    blocked = tmp_path / "blocked" / "array_record"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'array_record'\")")
    line = run_a_copy(
        tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path / "blocked"), lessons.environment()["PYTHONPATH"]])
    )
    assert line.startswith("錯誤：讀 MNIST 要用的 array_record 無法匯入 (No module named 'array_record')；")
    assert "WSL" in line
    assert "git checkout" not in line


# 訓練與比較 ------------------------------------------------------------------------------------------


def small(data, count=512):
    return mnist.Data(*(mnist.Split(split.images[:count], split.labels[:count]) for split in data))


def test_each_epoch_sees_every_image_once_and_counts_are_right(data, monkeypatch):
    """每輪的順序是不重複的編號；採樣準確率是平均獎勵。"""
    seen, decays, make_optimizer = [], [], grpo.make_optimizer
    log = {
        "reward": np.array([0.5, 0.7]), "silent": np.array([0.0, 0.5]), "residual": np.array([0.1, 0.2]),
        "loss": np.zeros((2, 3)), "clip_fraction": np.array([[0.0, 0.2, 0.4], [0.0, 0.2, 0.6]]),
    }  # fmt: skip
    monkeypatch.setattr(grpo, "train_epoch", lambda agent, data, order: seen.append(order) or log)
    monkeypatch.setattr(grpo, "make_optimizer", lambda *args: decays.append(args[1]) or make_optimizer(*args))
    result = grpo.train(grpo.Config(num_epochs=2, batch_size=200, train_epochs=3), small(data), progress=False)
    assert [order.shape for order in seen] == [(2, 200)] * 2
    assert all(len(set(order.ravel())) == 400 and order.max() < 512 for order in seen)
    assert not np.array_equal(*seen)
    columns = extras.columns(result.history)
    assert columns["train_accuracy"] == pytest.approx([60, 60])
    assert columns["silent_shares"] == [0.25] * 2
    assert columns["residuals"] == pytest.approx([0.15 / 0.24] * 2)
    assert columns["clip_fractions"] == pytest.approx([0.5] * 2)  # 最後一遍
    assert result.env_steps == 2 * 400 * 4
    assert decays == [2 * 2 * 3]  # 學習率照這份資料真正的更新次數下降，不是 60,000 張的


def test_less_than_a_batch_of_images_is_refused(data):
    with pytest.raises(ValueError, match="訓練集只有 512 張圖片"):
        grpo.train(grpo.Config(batch_size=513), small(data), progress=False)


def test_compiling_the_construction_changes_nothing():
    """編譯成一次呼叫的網路，與一步一步建立的相同；最佳化器的狀態也是。"""
    config = grpo.Config(algorithm="ppo", seed=7)
    compiled = grpo.make_agent(config, 1000)
    eager = grpo.GRPOAgent(config, 10 * 3 * 4, jax.random.key(7, impl="rbg"))
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(compare, *(nnx.state(agent, nnx.Not(nnx.RngState)) for agent in (compiled, eager)))
    assert not np.array_equal(weights(compiled.actor), weights(make_agent(seed=8).actor))


def test_the_log_of_an_epoch_is_that_of_its_batches(data):
    """編譯成一次呼叫的一整輪，第一批的紀錄與一步一步做的相同。"""
    config = grpo.Config(batch_size=64, group_size=2, group="image", train_epochs=3)
    subset, order = small(data).train, np.arange(128).reshape(2, 64)
    log = grpo.train_epoch(grpo.make_agent(config, 512), subset, order)
    agent = grpo.make_agent(config, 512)
    batch = rollout(agent, subset.images[:64] / 255, subset.labels[:64])
    clip_fraction = [float(train_actor(agent, batch)[1]) for _ in range(3)]
    rewards = np.asarray(batch.rewards)
    assert float(log["reward"][0]) == pytest.approx(rewards.mean())
    assert float(log["silent"][0]) == pytest.approx((rewards[0] == rewards[1]).mean())
    assert float(log["residual"][0]) == pytest.approx(rewards.var(axis=0).mean())
    np.testing.assert_allclose(log["clip_fraction"][0], clip_fraction, atol=0.02)
    assert log["loss"].shape == (2, 3)


def test_every_variant_of_the_comparison_is_what_its_name_says():
    rows = extras.variants(grpo.Config(compare=True))
    others = {name for name, row in rows.items() if row.algorithm != "grpo"}
    assert others == {"ppo", "supervised", "supervised_equal"}
    assert [rows[f"batch_{size}"].batch_size for size in extras.BATCH_SIZES] == [64, 256, 1024, 4096]
    rows = extras.variants(grpo.Config(compare=True, beta=0.1, clip_epsilon=0.1, group_size=2, batch_size=512))
    assert {row.beta for name, row in rows.items() if "supervised" not in name} == {0.1}
    assert (rows["supervised"].beta, rows["supervised"].clip_epsilon) == (0.0, 0.2)
    assert [rows[name].group_size for name in ("notes", "default", "image_4", "image_16", "ppo")] == [1, 2, 4, 16, 2]


def test_evaluation_is_greedy(data):
    agent = make_agent()
    subset = small(data).test
    logits = np.asarray(agent.actor(subset.images / 255).logits)
    guesses = logits.argmax(axis=1)
    accuracy, missing = grpo.evaluate(agent.actor, subset)
    assert accuracy == pytest.approx(float(100 * np.mean(guesses == np.asarray(subset.labels))))
    assert missing == 10 - len(set(guesses.tolist()))


def test_the_spread_of_the_baseline_follows_the_formula(data):
    """一張圖片答對的機率各不相同，批次平均的標準差仍是 √(p(1 - p) / B)。"""
    spreads = extras.baseline_spreads(make_agent().actor, small(data).train, seed=0)
    assert list(spreads) == [f"batch_{size}" for size in extras.BATCH_SIZES]
    for measured, formula in spreads.values():
        assert measured == pytest.approx(formula, rel=0.15)


def epoch(test_accuracy, **changed):
    return extras.Epoch(90.0, test_accuracy, 0, 0.0, 0.5, 1.0)._replace(**changed)


@pytest.fixture
def call(data, monkeypatch, tmp_path):
    """執行 main，但不真的訓練；call.stop_at 是第幾次訓練的時候按下 Ctrl-C，call.last 是最後一輪的成績。"""
    run_now = lesson.Run("test", grpo.__file__)
    subset = small(data, 64)

    def train(config, data, stop, progress=True):
        call.configs.append(config)
        if len(call.configs) == call.stop_at:
            stop.set()
        history = [] if stop.is_set() else [epoch(50.0), call.last or epoch(90.0 + len(call.configs))]
        return grpo.Result(grpo.make_agent(config, 60_000), history, [0.1] * 2, 0, 0.1, stop.is_set())

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["grpo_mnist.py", *flags, "--out-dir", str(tmp_path / "out")])
        grpo.main()

    call.configs, call.stop_at, call.last = [], None, None
    monkeypatch.setattr(grpo, "RUN", run_now)
    monkeypatch.setattr(grpo, "train", train)
    monkeypatch.setattr(mnist, "load", lambda _: subset)
    monkeypatch.setattr(extras.lesson_extras, "SEEDS", range(2))
    return call


def test_compare_leaves_figures_a_table_and_numbers(call, tmp_path, capsys):
    call("--compare")
    rows = metrics(tmp_path / "out")["comparison"]
    assert list(rows) == list(extras.variants(grpo.Config()))
    assert [config.seed for config in call.configs] == [0] * len(rows) + [1] * len(rows)
    assert rows["default"]["test_accuracy"] == [[50.0, 92.0], [50.0, 92.0 + len(rows)]]
    assert [name for name, row in rows.items() if "spreads" in row] == ["notes"]
    table = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert table == extras.comparison_table(rows)
    assert table in capsys.readouterr().out
    assert f"| `default` | 90.00 [—] | {92 + len(rows) / 2:.2f} [—] | 92.00 | — |" in table  # 兩個種子，沒有區間
    assert (tmp_path / "out" / "std_weights.png").stat().st_size > 0
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 0


def test_an_interrupted_comparison_keeps_what_is_done(call, tmp_path, capsys):
    call.stop_at = 3
    with pytest.raises(SystemExit) as stopped:
        call("--compare")
    assert stopped.value.code == 130
    assert list(metrics(tmp_path / "out")["comparison"]) == ["notes", "default"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("已中斷：完成 2 次訓練")


@pytest.mark.parametrize("flags", [(), ("--compare",)])
def test_an_interrupt_before_the_first_epoch_ends_writes_nothing(call, flags, tmp_path, capsys):
    call.stop_at = 1
    with pytest.raises(SystemExit) as stopped:
        call(*flags)
    assert stopped.value.code == 130
    assert "沒有寫任何檔案" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_stop_is_seen_between_two_epochs(data):
    stop = lesson.Run("test", grpo.__file__).stop
    config = grpo.Config(num_epochs=2, batch_size=256, train_epochs=1)
    stop.set()
    result = grpo.train(config, small(data), stop, progress=False)
    assert (result.history, result.env_steps, result.interrupted) == ([], 0, True)
    stop.clear()
    result = grpo.train(replace(config, num_epochs=1), small(data), stop, progress=False)
    assert (len(result.history), result.interrupted) == (1, False)


def test_results_are_saved_before_anything_is_drawn(call, monkeypatch, tmp_path):
    monkeypatch.setattr(extras, "draw_learning_curve", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.json", "weights.npz"}


def test_a_run_that_learnt_nothing_says_so(call, capsys):
    for changed, words in ({"silent_shares": 1.0}, "優勢都是 0"), ({"missing_digits": 9}, "有 9 個數字一次都不猜"):
        call.last = epoch(9.8, **changed)
        call()
        said, verdict, _ = capsys.readouterr().out.splitlines()
        assert words in said
        assert verdict.startswith("未達標：")
    call.last = epoch(9.8, silent_shares=1.0)
    call("--algorithm", "supervised")  # 它不用優勢學習
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("group_size", [2, 4, 16])
def test_dividing_by_the_standard_deviation_weights_the_images(group_size):
    """把每一種答對答錯的組合都算過：Σ 優勢 × ∂log π 的期望值，和公式的比例一樣；G = 2 時處處相同。"""
    rewards = np.array(list(itertools.product([0.0, 1.0], repeat=group_size))).T  # (G, 2^G)
    advantages = np.asarray(grpo.relative_advantages(jnp.array(rewards), jnp.array(rewards).mean(0), "image"))

    def update(p):
        slope = np.where(rewards == 1, 1 / p, -1 / (1 - p))  # ∂ log π / ∂p
        chance = np.where(rewards == 1, p, 1 - p).prod(axis=0)
        return (chance * (advantages * slope).sum(axis=0)).sum()

    p = np.array([0.01, 0.1, 0.5, 0.8])
    expected = np.array([update(x) for x in p]) / update(0.5)
    np.testing.assert_allclose(extras.std_weight(p, group_size), expected, rtol=1e-4)
    if group_size == 2:
        np.testing.assert_allclose(expected, 1, rtol=1e-4)


def test_compare_names_the_variant_that_cannot_run():
    with pytest.raises(ValueError, match="--compare 的 supervised_equal：--num-epochs 是 1200；"):
        grpo.Config(compare=True, num_epochs=300)


def test_compare_changes_one_thing_at_a_time():
    variants = extras.variants(grpo.Config())
    default = variants["default"]
    assert default == grpo.Config()
    for name, changed in {"image_4": {"group"}, "image_16": {"group", "group_size"}, "ppo": {"algorithm"}}.items():
        differences = {key for key, value in vars(variants[name]).items() if value != getattr(default, key)}
        assert differences == changed
    assert {key for key, value in vars(variants["batch_256"]).items() if value != getattr(default, key)} == {
        "group_size"
    }
    equal = variants["supervised_equal"]
    assert {key for key, value in vars(equal).items() if value != getattr(variants["supervised"], key)} == {
        "num_epochs"
    }
    assert equal.num_epochs * equal.train_epochs == default.num_epochs * default.train_epochs


@pytest.mark.parametrize(("beta", "advice"), [(1e6, "學習率或 β 調小"), (0.0, "學習率調小")])
def test_a_loss_that_is_not_finite_stops_the_run(data, beta, advice):
    """β 很大時真的發散；β = 0 的用壞掉的圖片。"""
    subset = small(data)
    if beta == 0:
        subset = subset._replace(train=subset.train._replace(images=jnp.full((512, 784), jnp.nan)))
    config = grpo.Config(num_epochs=1, batch_size=64, learning_rate=1.0, beta=beta, anneal_learning_rate=False)
    with pytest.raises(lesson.LessonError) as stopped:
        grpo.train(config, subset, progress=False)
    sentence, status = stopped.value.args
    assert status == 1
    assert re.fullmatch(rf"第 \d+ 次更新的損失不是有限的數；把{advice}再試", sentence)


def test_default_run_reaches_the_target(data, tmp_path):
    result = run("4_GRPO_MNIST", "--out-dir out", tmp_path, lessons.environment())
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("達標：")
    recorded = metrics(tmp_path / "out")
    assert len(recorded["train_accuracy"]) == len(recorded["test_accuracy"]) == 10
    assert recorded["train_accuracy"][-1] >= 97.34
    assert recorded["test_accuracy"][-1] >= 97.2
    assert recorded["parameters"] == recorded["memory_bytes"]["parameters"] / 4 == 118_282
    files = {"learning_curve.png", "mistakes.png", "weights.npz", "metrics.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files

    with np.load(tmp_path / "out" / "weights.npz", allow_pickle=False) as arrays:  # 存下來的就是評估過的網路
        x = np.asarray(data.test.images) / np.float32(255)
        for layer in ("fc1", "fc2"):
            x = np.maximum(x @ arrays[f"{layer}/kernel"] + arrays[f"{layer}/bias"], 0)
        guesses = (x @ arrays["fc_out/kernel"] + arrays["fc_out/bias"]).argmax(axis=1)
    assert 100 * np.mean(guesses == data.test.labels) == pytest.approx(recorded["test_accuracy"][-1], abs=0.02)
