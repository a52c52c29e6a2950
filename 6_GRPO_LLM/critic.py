"""第 6 課的對照組 PPO：評論家給每個詞元一個價值，GAE 把一個獎勵分給每個詞元。"""

import jax
import jax.numpy as jnp
from flax import nnx
from model import Transformer


def make_critic(config, base: Transformer, key: jax.Array) -> Transformer:
    """和演員一樣大，從基礎模型開始；只有輸出層是新的，輸出一個數。"""
    critic, fresh = nnx.clone(base), Transformer(config, nnx.Rngs(key), outputs=1)
    critic.fc_out = fresh.fc_out
    return critic


def normalize(values: jax.Array, mask: jax.Array) -> jax.Array:
    """減平均、除以標準差；只看 mask 是 1 的。"""
    mean = jnp.sum(values * mask) / jnp.sum(mask)
    spread = jnp.sqrt(jnp.sum((values - mean) ** 2 * mask) / jnp.sum(mask))
    return (values - mean) / (spread + 1e-8) * mask


def token_advantages(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, gae_lambda: float
) -> tuple[jax.Array, jax.Array]:
    """每個詞元的 GAE，從後往前；γ = 1，獎勵 (N,) 在最後一個詞元。

    values 與 mask 是 (N, 長度)；回傳標準化的優勢，與評論家的目標 (優勢 + 價值)，形狀相同。
    """
    following = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))  # 後面還有詞元嗎
    next_values = following * jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = (mask - following) * rewards[:, None] + next_values - values

    def back(advantage, step):
        delta, more = step
        advantage = delta + gae_lambda * more * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(back, jnp.zeros_like(rewards), (deltas.T, following.T), reverse=True)
    advantages = advantages.T * mask
    return normalize(advantages, mask), advantages + values
