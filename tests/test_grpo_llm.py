"""第 6 課：題目、KV 快取、遮罩、三種平均、群組的優勢與梯度、PPO 的 GAE、pass@k、切分，都對照獨立的算法。"""

import itertools
import math
import socket
import subprocess
import sys

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from lessons import SHORT, environment, load, metrics, run, script, short_environment

llm = load("6_GRPO_LLM")
task, critic, axis_rules, extras = llm.task, llm.critic, llm.axis_rules, llm.extras
SMALL = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 32, "pretrain_batch_size": 16}
SMALL |= {"pretrain_steps": 4, "num_prompts": 8, "group_size": 2, "updates": 2}
SMALL |= {"seed": 2}  # 第一批就有對有錯；都沒有訊號時，Adam 會把梯度的捨入誤差放大，每種切法各走各的


def small(**changes):
    return llm.Config(**SMALL | {"mesh": "1x1"} | changes)


def make_actor(config, seed: int = 0):
    """沒訓練過的小模型；要在 on_mesh 裡。"""
    return nnx.jit(lambda key: llm.Transformer(config, nnx.Rngs(key)))(jax.random.key(seed))


def flags_of(config) -> list[str]:
    return [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in SMALL]


# 題目

numbers = st.integers(0, 999)


def check_by_hand(answer: str, a: int, b: int) -> bool:
    """用 Python 的字串判斷：有句點，句點前最後一個逗號之後剛好是和。"""
    head, stop, _ = answer.partition(".")
    return bool(stop) and head.split(",")[-1] == str(a + b)


@given(numbers, numbers)
@settings(max_examples=300)
def test_answers_are_the_sums_of_python(a, b):
    assert task.prompt_text(a, b) == f"{a:03}+{b:03}="
    assert task.answer_text(a, b, False) == f"{a + b}."
    *steps, last = task.answer_text(a, b, True).split(",")
    assert last == f"{a + b}."
    carry, digits = 0, ""
    for step, x, y in zip(steps, reversed(f"{a:03}"), reversed(f"{b:03}"), strict=True):
        left, total = step.split("=")
        terms = [int(term) for term in left.split("+")]
        assert terms == [int(x), int(y)] + [1] * carry
        assert sum(terms) == int(total)
        carry, digits = int(total) // 10, total[-1] + digits
    assert int(str(carry) + digits) == a + b


def test_the_longest_answer_fills_the_room():
    assert len(task.answer_text(999, 999, True)) == task.ANSWER_LENGTH
    assert task.answer_text(347, 286, True) == "7+6=13,4+8+1=13,3+2+1=6,633."


@given(numbers, numbers, st.booleans(), st.integers(0, 99))
def test_tokens_can_be_read_back(a, b, stepwise, seed):
    """逐步作答的文字都是對的；直接作答的是一個差不到 50 的數。"""
    (row,) = task.make_texts(np.array([a * 1000 + b]), stepwise, np.random.default_rng(seed))
    prompt, answer = task.decode(row)[: task.PROMPT_LENGTH], task.decode(row)[task.PROMPT_LENGTH :]
    assert prompt == task.prompt_text(a, b)
    assert answer == task.answer_text(a, b, True) if stepwise else abs(int(answer.rstrip(".")) - (a + b)) <= 50
    (prompt,), (total,) = task.make_prompts(np.array([a * 1000 + b]))
    assert (task.decode(prompt), total) == (task.prompt_text(a, b), a + b)


def test_direct_answers_are_seldom_right():
    problems = np.random.default_rng(0).integers(0, 10**6, 20_000)
    texts = task.make_texts(problems, False, np.random.default_rng(1))
    right = [int(task.decode(row)[8:-1]) == sum(divmod(n, 1000)) for row, n in zip(texts, problems, strict=True)]
    assert np.mean(right) == pytest.approx(1 / 101, abs=0.003)


@given(numbers, numbers, st.lists(st.sampled_from("0123456789+=,."), max_size=task.ANSWER_LENGTH), st.integers(0, 3))
@settings(max_examples=300)
def test_rewards_equal_a_check_with_strings(a, b, noise, kind):
    """亂寫的、對的、差一點的答案；句點之後的都拿掉，和採樣一樣。"""
    text = "".join(noise) if kind == 0 else task.answer_text(a, b, kind == 1)
    if kind == 3:
        text = "".join(noise[:3]) + "," + text
    head, stop, _ = text[: task.ANSWER_LENGTH].partition(".")
    answer, total = task.encode([head + stop], task.ANSWER_LENGTH), np.array([a + b])
    assert task.calculate_rewards(answer, total, "exact")[0] == check_by_hand(head + stop, a, b)
    last_digit = bool(stop) and head[-1:] == str(a + b)[-1]
    assert task.calculate_rewards(answer, total, "last-digit")[0] == last_digit


def test_the_mask_ends_with_the_full_stop():
    answers = task.encode(["633.", "7,633", ".", "1.5."], task.ANSWER_LENGTH)
    mask = np.asarray(task.answer_mask(answers))
    np.testing.assert_array_equal(mask.sum(axis=1), [4, task.ANSWER_LENGTH, 1, 2])
    assert (np.diff(mask, axis=1) <= 0).all()


def test_test_problems_are_never_trained_on():
    train, test = task.split_problems()
    assert len(train) + len(test) == 10**6
    assert not np.isin(test, train).any()


# 模型與採樣


def test_the_cache_gives_the_logits_of_the_full_pass():
    config = small(num_layers=2)
    with extras.on_mesh(config):
        actor = make_actor(config)
        tokens = np.random.default_rng(0).integers(0, task.VOCAB, (3, 20))
        full, decoder = nnx.jit(lambda actor, tokens: actor(tokens))(actor, tokens), nnx.clone(actor)
        decoder.init_cache(3)
        step = nnx.jit(lambda decoder, token, position: decoder(token, position, decode=True))
        for position in range(20):
            one = step(decoder, tokens[:, position : position + 1], position)
            np.testing.assert_allclose(one[:, 0], full[:, position], atol=1e-5)


def test_sampled_tokens_come_with_their_log_probabilities():
    config = small()
    with extras.on_mesh(config):
        actor = make_actor(config)
        prompts, _ = task.make_prompts(np.arange(0, 10**6, 123_456)[:8])
        sample = nnx.jit(llm.sample, static_argnames="group_size")
        answers, log_probs = sample(actor, prompts, jax.random.key(1), 4)
        tokens = np.concatenate([np.repeat(prompts, 4, axis=0), answers], axis=1)
        mask = np.asarray(task.answer_mask(answers))
        again = nnx.jit(llm.answer_log_probs)(actor, tokens)
        np.testing.assert_allclose(log_probs * mask, again * mask, atol=1e-5)
        assert (np.asarray(answers)[mask == 0] == task.PAD).all()
        assert len({row.tobytes() for row in np.asarray(answers)}) > 16  # G 個答案各寫各的
        greedy, _ = sample(actor, prompts, jax.random.key(2), 1, True)
        best = nnx.jit(llm.answer_outputs)(actor, np.concatenate([prompts, greedy], axis=1)).argmax(axis=2)
        counted = np.asarray(task.answer_mask(greedy)) == 1
        np.testing.assert_array_equal(np.asarray(greedy)[counted], np.asarray(best)[counted])


def test_an_untrained_model_has_the_loss_of_a_guess():
    config = small()
    with extras.on_mesh(config):
        loss = llm.text_loss(make_actor(config), task.Problems(0).test_texts(8, 8))
    assert float(loss) == pytest.approx(math.log(task.VOCAB), abs=1.0)


# 優勢與目標


def test_the_eight_scores_of_the_notes():
    scores = jnp.array([[7.2, 8.5, 6.1, 9.0, 7.8, 6.5, 8.2, 7.5]])
    plain = llm.relative_advantages(scores, divide=False)
    np.testing.assert_allclose(plain[0], [-0.4, 0.9, -1.5, 1.4, 0.2, -1.1, 0.6, -0.1], atol=1e-5)
    np.testing.assert_allclose(llm.relative_advantages(scores)[0], plain[0] / np.std(scores), rtol=1e-5)


def test_a_silent_group_has_no_advantage():
    rewards = jnp.array([[1.0] * 7, [0.0] * 7, [1.0] * 6 + [0.0]])
    advantages = np.asarray(llm.relative_advantages(rewards))
    assert not advantages[:2].any()
    assert advantages[2].all()


def test_three_averages_of_two_answers_by_hand():
    values = jnp.array([[1.0, 2.0, 3.0, 6.0], [10.0, 50.0, 70.0, 90.0]])
    mask = jnp.array([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    expected = {"grpo": (3 + 10) / 2, "dapo": 22 / 5, "dr_grpo": 22 / 8}
    for kind, value in expected.items():
        assert float(llm.average(values, mask, kind)) == pytest.approx(value)


def test_the_gradient_equals_the_enumeration_of_every_pair_of_answers():
    """三個詞元、兩步的策略：把每一對答案都算進來，梯度是真正的梯度的 (1 - 1/G)，再除以長度。"""
    answers = np.array(list(itertools.product(range(3), repeat=2)))
    rewards = jnp.array(np.random.default_rng(0).normal(size=9), jnp.float32)
    weights = jnp.array(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)  # 第一步一列，第二步看第一個詞元

    def log_probs(weights):
        table = jax.nn.log_softmax(weights)
        return jnp.stack([table[0, answers[:, 0]], table[1 + answers[:, 0], answers[:, 1]]], axis=1)

    def expected_reward(weights):
        return jnp.sum(jnp.exp(log_probs(weights).sum(axis=1)) * rewards)

    old = log_probs(weights)
    chance = jnp.exp(old.sum(axis=1))

    pairs = np.array(list(itertools.product(range(9), repeat=2)))  # 群組是兩個答案

    def expected_objective(weights):
        advantages = llm.relative_advantages(rewards[pairs], divide=False)
        ratio = jnp.exp(log_probs(weights) - old)[pairs]
        objective = llm.clipped_objective(ratio, advantages[..., None], 0.2)
        averages = jax.vmap(lambda pair: llm.average(pair, jnp.ones_like(pair), "grpo"))(objective)
        return jnp.sum(chance[pairs].prod(axis=1) * averages)

    ours, exact = jax.jit(jax.grad(expected_objective))(weights), jax.grad(expected_reward)(weights)
    np.testing.assert_allclose(ours, exact * (1 - 1 / 2) / 2, atol=1e-6)


def test_the_objective_at_the_old_policy_and_its_kl():
    config = small(beta=0.5)
    with extras.on_mesh(config):
        agent = llm.build_agent(config, make_actor(config), jax.random.key(0))
        prompts, sums = task.Problems(0).prompts(8)
        batch = nnx.jit(lambda agent: agent.rollout(prompts, sums, jax.random.key(0)))(agent)
        judge = nnx.jit(lambda actor: agent.actor_objective(actor, batch))
        objective, clip_fraction = judge(agent.actor)
        assert float(objective) == pytest.approx(0, abs=1e-5)  # 比例是 1，優勢的平均是 0，KL 是 0
        assert float(clip_fraction) == 0
        moved = judge(make_actor(config, seed=1))
    assert float(moved[1]) > 0.5
    log_p, log_q = jnp.log(jnp.array([0.2, 0.3, 0.5])), jnp.log(jnp.array([0.6, 0.3, 0.1]))
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q))
    assert float(jnp.sum(jnp.exp(log_p) * llm.kl_estimate(log_p, log_q))) == pytest.approx(float(kl), rel=1e-5)


def test_what_follows_the_full_stop_cannot_overflow():
    """句點之後的詞元不算，可是 exp(-5 + 100) 已經是 inf，乘上遮罩的 0 是 NaN；參考模型的也一樣。"""
    config = small(beta=0.5)
    with extras.on_mesh(config):
        agent = llm.build_agent(config, make_actor(config), jax.random.key(0))
        prompts, sums = task.Problems(0).prompts(8)
        batch = nnx.jit(lambda agent: agent.rollout(prompts, sums, jax.random.key(0)))(agent)
        batch = batch._replace(advantages=jax.random.normal(jax.random.key(1), batch.mask.shape))
        judge = nnx.jit(nnx.value_and_grad(lambda actor, batch: agent.actor_objective(actor, batch)[0]))
        moved = make_actor(config, seed=1)
        expected = judge(moved, batch)
        assert all(np.isfinite(x).all() and x.any() for x in jax.tree.leaves(expected))
        for name, value in (("log_probs", -100.0), ("reference_log_probs", 100.0)):
            changed = jnp.where(batch.mask == 0, value, getattr(batch, name))
            assert (changed == value).any()
            jax.tree.map(np.testing.assert_array_equal, judge(moved, batch._replace(**{name: changed})), expected)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
@settings(max_examples=15)
def test_advantages_per_token_equal_the_definition(seed, gae_lambda):
    """第 3 課的式 (16)：A_t = Σ_l λ^l δ_{t+l}，加到句點為止；γ = 1，獎勵在最後一個詞元。"""
    rng = np.random.default_rng(seed)
    values, rewards, lengths = rng.normal(size=(3, 6)), rng.normal(size=3), rng.integers(1, 7, 3)
    mask = (np.arange(6) < lengths[:, None]).astype(float)
    normalized, returns = critic.token_advantages(*map(jnp.asarray, (rewards, values, mask)), gae_lambda)
    expected = np.zeros((3, 6))
    for row, length in enumerate(lengths):
        for t in range(length):
            for k in range(t, length):
                last = k == length - 1
                delta = (rewards[row] if last else values[row, k + 1]) - values[row, k]
                expected[row, t] += gae_lambda ** (k - t) * delta
    np.testing.assert_allclose((returns - values) * mask, expected, atol=1e-4)
    counted = expected[mask == 1]
    standard = (counted - counted.mean()) / (counted.std() + 1e-8)
    if counted.std() > 1e-3:
        np.testing.assert_allclose(np.asarray(normalized)[mask == 1], standard, atol=1e-3)


# 評估


def test_pass_at_k_equals_counting_every_choice():
    correct = np.random.default_rng(0).random((5, 7)) < 0.3
    for k in (1, 2, 4, 7):
        chosen = [[row[list(some)].any() for some in itertools.combinations(range(7), k)] for row in correct]
        assert extras.pass_at_k(correct, k) == pytest.approx(np.mean(chosen))


# 訓練


@pytest.fixture(scope="module")
def trained():
    """同樣的設定，一個裝置，與八個裝置 (4x2)。"""
    results = {}
    for mesh in ("1x1", "4x2"):
        config = small(mesh=mesh, beta=0.1, train_epochs=2, reward="last-digit")
        results[mesh] = llm.train(config, progress=False)
    return results


def weights_of(module) -> dict:
    return {name: np.asarray(param[...]) for name, param in extras.lesson_extras.named_weights(module).items()}


def test_eight_devices_find_what_one_finds(trained):
    one, eight = trained["1x1"], trained["4x2"]
    assert 0 < one.curve["reward"][0] < 1
    np.testing.assert_allclose(one.pretrain_losses, eight.pretrain_losses, rtol=1e-4)
    for name in ("reward", "length", "step_by_step", "silent", "tokens"):
        assert one.curve[name] == eight.curve[name], name  # 每一個詞元都一樣
    np.testing.assert_allclose(one.curve["loss"], eight.curve["loss"], rtol=1e-3, atol=1e-6)
    agent = eight.agent
    kernel = agent.actor.blocks[0].fc1.kernel[...]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(16, 16)}  # mlp 切成兩份
    assert len(kernel.addressable_shards) == 8
    for module in (agent.actor, agent.reference):
        query = module.blocks[0].attention.query.kernel[...]
        assert {shard.data.shape for shard in query.addressable_shards} == {(16, 1, 8)}
    moments = [x for x in jax.tree.leaves(nnx.state(agent.actor_optimizer)) if x.shape == (16, 32)]
    assert len(moments) == 2  # fc1 的兩個動差
    assert all(x.addressable_shards[0].data.shape == (16, 16) for x in moments)


def test_the_reference_stays_and_the_actor_moves(trained):
    result = trained["1x1"]
    base, reference, actor = (weights_of(m) for m in (result.base, result.agent.reference, result.agent.actor))
    for name, array in base.items():
        np.testing.assert_array_equal(array, reference[name])
    assert any((array != actor[name]).any() for name, array in base.items())


def test_a_second_experiment_starts_from_the_saved_base(trained, tmp_path):
    base = tmp_path / "base.npz"
    extras.lesson_extras.save_weights(base, trained["1x1"].base)
    changes = {name: value for name, value in SMALL.items() if not name.startswith("pretrain")}
    config = llm.Config(**changes, mesh="1x1", beta=0.1, train_epochs=2, reward="last-digit", base=base)
    again = llm.train(config, progress=False)
    assert again.pretrain_losses == []
    assert again.curve == trained["1x1"].curve
    for content in (b"", base.read_bytes()[:500], b"not weights"):
        base.write_bytes(content)
        with pytest.raises(llm.lesson.LessonError, match=r"--base .*讀不出這一課的權重") as refused:
            llm.train(config, progress=False)
        assert refused.value.args[1] == 2


def test_dynamic_sampling_keeps_the_groups_that_speak():
    def batch(advantages):
        rows = jnp.arange(len(advantages)) + 100 * advantages[:, 0]
        return llm.Batch(*[rows] * 5, advantages, rows)

    old = batch(jnp.array([[0.0], [0.0], [1.0], [-1.0], [0.0], [0.0]]))  # 三題，各兩個答案
    more = batch(jnp.array([[0.0], [0.0], [2.0], [-2.0], [3.0], [-3.0]]))
    kept = extras.keep_live(old, more, 3)
    np.testing.assert_array_equal(kept.advantages[:, 0], [1, -1, 2, -2, 3, -3])
    np.testing.assert_array_equal(kept.tokens, [102, -97, 202, -197, 304, -295])
    assert list(extras.silent_groups(old, 3)) == [True, False, True]


def test_no_two_draws_share_a_key(monkeypatch):
    """初始的權重、評論家、每一次採樣的每個詞元，亂數的 key 都不同；重新採樣的也是。"""
    keys, collect = list(llm.make_keys(2)[:2]), llm.collect

    def spy(agent, prompts, sums, key):
        keys.extend([key, *jax.random.split(key, task.ANSWER_LENGTH)])
        batch, log = collect(agent, prompts, sums, key)
        return batch._replace(advantages=jnp.zeros_like(batch.advantages)), log  # 沒有訊號，永遠要再採樣

    monkeypatch.setattr(llm, "collect", spy)
    llm.train(small(dynamic_sampling=True), progress=False)
    assert len(keys) == 2 + 2 * llm.SAMPLING_ROUNDS * (1 + task.ANSWER_LENGTH)
    assert len(np.unique([jax.random.key_data(key) for key in keys], axis=0)) == len(keys)


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "ppo", "reward": "last-digit", "loss_average": "dapo"},
        {"algorithm": "supervised", "step_by_step_share": 0.0},
        {"dynamic_sampling": True, "reward": "last-digit", "step_by_step_share": 1.0},
    ],
)
def test_every_way_of_learning_changes_the_actor(changes):
    config = small(updates=1, **changes)
    result = llm.train(config, progress=False)
    base, actor = weights_of(result.base), weights_of(result.agent.actor)
    assert any((array != actor[name]).any() for name, array in base.items())
    if config.algorithm == "ppo":
        assert result.agent.critic.fc_out.kernel.shape == (16, 1)


@pytest.mark.parametrize("algorithm", ["grpo", "supervised"])
def test_tokens_are_counted_one_by_one(algorithm):
    """25 個答案的平均長度不是 float32 寫得準的數，詞元的個數卻是。"""
    changes = {"num_prompts": 5, "group_size": 5, "updates": 1, "step_by_step_share": 0.0}
    result = llm.train(small(algorithm=algorithm, **changes), progress=False)
    (tokens,), (length,) = result.curve["tokens"], result.curve["length"]
    rows = 25 if algorithm == "grpo" else 25 * extras.SUPERVISED_TEXTS
    assert tokens == round(length * rows)


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(llm.lesson.LessonError, match="預訓練第 3 步的損失不是有限的數"):
        llm.check_finite(np.array([1.0, np.nan]), 1, "預訓練")


def test_rules_name_what_is_wrong():
    for changes, message in (
        ({"rules": "mlp=pipe"}, "Mesh 的軸只有"),
        ({"rules": "batch=data,heads=data"}, "都切在 data 軸上"),
        ({"mesh": "3x1"}, "除不盡"),
        ({"rules": "heads=model", "mesh": "1x4"}, "heads 的 2 切成 4 份"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**changes)
    with extras.on_mesh(small(mesh="4x2", rules="batch=data,vocab=data+model")):
        cut = [axis_rules.distribute(np.zeros((16, 8)), *axes) for axes in ((None, "batch"), ("vocab", "embed"))]
    assert [array.sharding.spec for array in cut] == [jax.P(None, "data"), jax.P(("data", "model"), None)]


@pytest.mark.parametrize("outputs", [task.VOCAB, 1])
def test_the_rule_book_knows_the_names_on_the_weights(outputs):
    """check_rules 檢查的是 WEIGHTS，真正決定怎麼切的是寫在權重旁邊的名字：兩邊要一樣。"""
    config, last = small(), "fc_out" if outputs == task.VOCAB else "value"
    with extras.on_mesh(config):
        model = nnx.eval_shape(lambda: llm.Transformer(config, nnx.Rngs(0), outputs))
    same = {"key": "query", "value": "query", "attention_norm": "norm", "mlp_norm": "norm", "fc_out": last}
    written = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = same.get(path[-2], path[-2])
        assert written.setdefault(name, param.get_metadata("out_sharding")) == axis_rules.WEIGHTS[name], path
    assert written.keys() == axis_rules.WEIGHTS.keys() - ({"fc_out", "value"} - {last})


def test_two_processes_find_the_tokens_of_one(trained, tmp_path):
    """兩個行程各有一個假裝置，經由 loopback 合成一張 2x1 的 Mesh。"""
    config = small(beta=0.1, train_epochs=2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(script("6_GRPO_LLM")), *flags_of(config), "--beta=0.1", "--train-epochs=2"]
    command += ["--reward=last-digit", "--mesh=2x1", f"--coordinator=127.0.0.1:{port}", "--num-processes=2"]
    processes = [
        subprocess.Popen(
            [*command, f"--process-id={i}", f"--out-dir=out{i}"],
            cwd=tmp_path, env=short_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0].splitlines()[-1] == "結果存在 out0"
    assert not (tmp_path / "out1").exists()
    together = metrics(tmp_path / "out0")
    assert together["device"]["count"] == 2
    for name in ("reward", "length", "tokens"):
        assert together["curve"][name] == trained["1x1"].curve[name]


def test_a_missing_base_is_refused_in_one_sentence(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = call("6_GRPO_LLM", "--base nothing.npz --mesh 1x1 --out-dir out")
    assert status == 2
    assert err.startswith("錯誤：--base nothing.npz 讀不出這一課的權重")
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_experiments_refuse_what_they_decide_themselves():
    for changes, word in (
        ({"compare": True, "beta": 0.1}, "--beta"),
        ({"compare": True, "train_epochs": 2}, "--train-epochs"),
        ({"compare": True, "measure": "cost"}, "一次只能做一樣"),
        ({"measure": "mesh", "mesh": "2x1"}, "--measure mesh 配上 --mesh"),
        ({"measure": "mesh", "num_heads": 2}, "heads 的 2 切成 4 份"),
        ({"measure": "cost", "group_size": 4}, "--measure cost 配上 --group-size"),
        ({"measure": "ledger", "num_heads": 2}, "--measure ledger 配上 --num-heads"),
        ({"measure": "ledger", "beta": 0.3}, "--measure ledger 配上 --beta"),
        ({"compare": True, "group_size": 4}, "--group-size"),
        ({"base": llm.Path("base.npz"), "pretrain_steps": 5}, "--base 配上 --pretrain-steps"),
        ({"algorithm": "supervised", "beta": 0.1}, "--algorithm supervised 配上 --beta"),
        ({"compare": True, "num_prompts": 2}, "除不盡"),  # G = 16 只剩一題
    ):
        with pytest.raises(ValueError, match=word):
            llm.Config(**changes)
    llm.Config(measure="cost", num_heads=2, beta=0.3)  # 只有 mesh 才把頭切成四份
    llm.Config(measure="ledger", group_size=16)
    names = extras.variants(llm.Config(compare=True))
    assert {variant.rows for variant in names.values()} == {256}
    assert not any(variant.compare for variant in names.values())


def test_text_rows_are_shared_evenly():
    assert llm.Config().text_rows(64) == (40, 24)
    assert small(step_by_step_share=1.0).text_rows(16) == (0, 16)
    assert small(step_by_step_share=0.0).text_rows(16) == (16, 0)


def test_the_ledger_counts_the_published_parameters():
    shape = extras.measurements.LLAMA3_8B
    assert extras.measurements.count_parameters(shape) == shape["parameters"] == 8_030_261_248
    rows = extras.measurements.measure_ledger(llm.Config(), None, None)
    assert [round(row["bytes"] / 1e9) for row in rows[:3]] == [64, 16, 64]
    assert rows[3]["bytes"] == 8 * 1024 * 131_072  # 一個詞元 128 KiB


def test_sampling_without_the_cache_writes_the_same_tokens():
    config = small()
    with extras.on_mesh(config):
        actor, key = make_actor(config), jax.random.key(3)
        prompts, _ = task.make_prompts(np.arange(8) * 111_111)
        cached = nnx.jit(lambda actor: llm.sample(actor, prompts, key, 2)[0])(actor)
        plain = nnx.jit(lambda actor: extras.measurements.sample_without_cache(actor, prompts, key, 2))(actor)
    np.testing.assert_array_equal(cached, plain)


def test_the_comparison_shows_what_was_recorded(tmp_path):
    """三個假的種子；一種做法和 default 一樣，一種差十個百分點；沒有跑的做法不畫。"""

    def rows(shift: float) -> dict:
        summary = dict.fromkeys(("greedy", "length", "step_by_step", "language_model_loss", "unfinished"), 1.0)
        summary["pass_at_k"] = dict.fromkeys(extras.PASS_KS, 50.0)
        names = ("reward", "length", "step_by_step", "silent", "clip_fraction", "tokens")
        curve = {name: [0.25, 0.5] for name in names}
        seconds = {"pretrain": 1.0, "sample": 2.0, "learn": 3.0}
        columns = {}
        for seed in range(3):
            trained = summary | {"sampled": 80.0 + seed - shift}
            row = extras.columns(summary | {"sampled": 30.0}, trained, curve, seconds, {"parameters": 2_000_000})
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
        return columns

    recorded = {"default": rows(0), "K_4": rows(0), "last_digit": rows(10)}
    table = extras.comparison_table(recorded)
    same, worse = (next(line for line in table.splitlines() if f"`{name}`" in line) for name in ("K_4", "last_digit"))
    assert "| +0.0 [+0.0, +0.0]，看不出差別 |" in same
    assert "| -10.0 [-10.0, -10.0]，較差 |" in worse
    assert worse.startswith("| `last_digit` | 71.0 [70.0, 72.0] | 70.0 |")
    extras.draw_comparison(recorded, tmp_path)
    assert (tmp_path / "comparison.png").stat().st_size > 0


def test_an_interrupt_while_pretraining_writes_nothing(tmp_path, monkeypatch, call):
    """還沒有開始學：以前的 base.npz 與 weights.npz 都還在。"""
    train = llm.train

    def interrupted(config, stop):
        stop.set()
        return train(config, stop, progress=False)

    monkeypatch.setattr(llm, "train", interrupted)
    monkeypatch.setattr(llm.RUN, "stop", type(llm.RUN.stop)())
    status, out, _ = call("6_GRPO_LLM", f"{SHORT['6_GRPO_LLM']} --out-dir {tmp_path / 'out'}")
    assert (status, out) == (130, "已中斷：還沒有學到東西，沒有寫任何檔案\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("measured", "status"), [(6, 0), (3, 130)])
def test_an_interrupt_after_the_last_row_is_a_finished_run(tmp_path, monkeypatch, call, measured, status):
    kinds = extras.measurements.MEASUREMENTS
    ledger = kinds["ledger"]

    def interrupted(config, story, stop):
        stop.set()
        return ledger.function(config, story, stop)[:measured]

    monkeypatch.setitem(kinds, "ledger", ledger._replace(function=interrupted))
    monkeypatch.setattr(llm.RUN, "stop", type(llm.RUN.stop)())
    ended, out, _ = call("6_GRPO_LLM", f"--measure ledger --out-dir {tmp_path}")
    assert ended == status
    assert len(metrics(tmp_path)["ledger"]) == measured
    assert out.splitlines()[-1].startswith("已中斷：量了 3 列" if status else "結果存在")


def test_a_run_in_which_every_answer_is_wrong_says_so(tmp_path, call):
    status, out, _ = call("6_GRPO_LLM", f"{SHORT['6_GRPO_LLM']} --out-dir {tmp_path / 'out'}")
    assert status == 0
    assert metrics(tmp_path / "out")["curve"]["reward"][-1] == 0  # 預訓練兩步的模型什麼都不會
    assert "最後一批的答案全錯" in out


def test_default_run_reaches_the_target(tmp_path):
    """整個預設的執行：基礎模型一半以上不對，GRPO 之後幾乎全對，而且是因為改用逐步作答。"""
    result = run("6_GRPO_LLM", "--out-dir out", tmp_path, environment())
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2].startswith("達標：")
    recorded = metrics(tmp_path / "out")
    base, trained = recorded["base"], recorded["trained"]
    assert base["sampled"] < 50
    assert trained["sampled"] >= llm.SAMPLED_TARGET
    assert trained["greedy"] >= llm.GREEDY_TARGET
    assert trained["length"] > base["length"] + 5
    assert trained["step_by_step"] > 95
    assert len(recorded["curve"]["reward"]) == recorded["updates"] == 36
    figures = {"learning_curve.png", "pass_at_k.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == figures | {"base.npz", "weights.npz", "metrics.json"}
