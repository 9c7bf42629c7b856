"""The noise of cpu/draws.py on a device, for many tokens at once."""

from torch import Tensor

from gpu_worker.engine.cpu.draws import FACTORS


def keyed_noise(token_ids: Tensor, keys: Tensor) -> Tensor:
    """Float32, one row per draw. `token_ids` is int32 (num_draws or 1, num_tokens), `keys` int32 (num_draws, 2): the
    noise_key of each."""
    first, second = keys.T[:, :, None]
    return _gumbel(_mix(token_ids, first, second))


def _gumbel(bits: Tensor) -> Tensor:
    bits = bits.bitwise_and_(0x7FFFFFFF)
    return bits.float().add_(0.5).mul_(-(2.0**-31)).log1p_().neg_().log_().neg_()


def _mix(token_ids: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """In wrapping int32 arithmetic, whose shifts copy the sign."""
    scatter, mix, mix_again = (factor - 2**32 if factor >= 2**31 else factor for factor in FACTORS)
    bits = (token_ids * scatter).add(first)
    bits = bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(mix)
    bits = bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).bitwise_xor_(second).mul_(mix_again)
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))
