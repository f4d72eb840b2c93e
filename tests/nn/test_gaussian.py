"""The diagonal normal against torch.distributions, Monte-Carlo estimates and the score function."""

import torch
from torch.distributions import Normal, kl_divergence

from vaescale.nn import gaussian

DRAWS = 200_000


def posterior(dtype: torch.dtype = torch.float32) -> gaussian.Normal:
    output = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    return gaussian.normal(output.to(dtype))


def prior() -> gaussian.Normal:
    return gaussian.normal(torch.randn(3, 10, generator=torch.Generator().manual_seed(1)))


def rates(q: gaussian.Normal) -> torch.Tensor:
    """To N(0, I)."""
    return gaussian.kl(q, gaussian.standard(q.mean))


def test_kl_and_densities_are_those_of_torch() -> None:
    q, p = posterior(), prior()
    theirs = Normal(q.mean, q.log_std.exp())
    torch.testing.assert_close(rates(q), kl_divergence(theirs, Normal(0.0, 1.0)))
    torch.testing.assert_close(gaussian.kl(q, p), kl_divergence(theirs, Normal(p.mean, p.log_std.exp())))
    z = torch.randn(3, 5)
    torch.testing.assert_close(q.log_density(z), theirs.log_prob(z))
    torch.testing.assert_close(gaussian.standard(z).log_density(z), Normal(0.0, 1.0).log_prob(z))


def test_rates_keep_their_digits_where_the_posterior_is_the_prior() -> None:
    """(σ² − 1)/2 − log σ is ε² for σ = e^ε: half of nothing is left of it if σ² is rounded first."""
    log_std = torch.tensor([[1e-3, -1e-3]])
    exact = rates(gaussian.Normal(torch.zeros(1, 2).double(), log_std.double()))
    torch.testing.assert_close(rates(gaussian.Normal(torch.zeros(1, 2), log_std)).double(), exact, rtol=1e-3, atol=0)


def test_the_kl_is_its_monte_carlo_estimate() -> None:
    torch.manual_seed(0)
    q, p = posterior(), prior()
    many, theirs = (gaussian.Normal(*(part.repeat(DRAWS, 1) for part in normal)) for normal in (q, p))
    z = many.draw(torch.randn(3 * DRAWS, 5))
    ratios = (many.log_density(z) - theirs.log_density(z)).sum(1).view(DRAWS, 3).double()
    error, kl = ratios.std(0) / len(ratios) ** 0.5, gaussian.kl(q, p).sum(1)
    assert ((ratios.mean(0) - kl).abs() < 4 * error).all()
    assert (error < 0.01 * kl).all()  # so small that the test means something


def test_the_reparametrised_gradient_is_that_of_the_score_function() -> None:
    """∇ E_q[f(z)] in two ways: E[∇ f(z(ζ))], and E[f(z) ∇ log q(z)] (Williams 1992), f neither odd nor even."""
    torch.manual_seed(1)
    mean = torch.tensor([0.3, -0.8], dtype=torch.float64).expand(DRAWS, 2).clone().requires_grad_()
    log_std = torch.tensor([-0.5, 0.2], dtype=torch.float64).expand(DRAWS, 2).clone().requires_grad_()
    q = gaussian.Normal(mean, log_std)

    def f(z: torch.Tensor) -> torch.Tensor:
        return torch.sin(z[:, 0]) + z[:, 0] * z[:, 1] ** 2

    z = q.draw(torch.randn(DRAWS, 2, dtype=torch.float64))
    through = torch.autograd.grad(f(z).sum(), (mean, log_std))
    score = torch.autograd.grad((f(z).detach() * q.log_density(z.detach()).sum(1)).sum(), (mean, log_std))
    for ours, theirs in zip(through, score, strict=True):
        difference = ours - theirs
        error = difference.std(0) / DRAWS**0.5
        assert (difference.mean(0).abs() < 4 * error).all()
        assert (error < 0.02).all()
        assert ours.mean(0).abs().max() > 0.3  # there is a gradient to agree on


def test_halves_are_taken_up_in_fp32() -> None:
    """Computed in bf16 the same KL is off by more than a thousandth: the island is needed."""
    q = posterior(torch.bfloat16)
    assert q.mean.dtype == torch.float32
    exact = rates(gaussian.Normal(q.mean.double(), q.log_std.double())).sum(1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(rates(q).sum(1).double(), exact, rtol=1e-6, atol=0)
    rounded = rates(gaussian.Normal(q.mean.bfloat16(), q.log_std.bfloat16())).sum(1)
    assert ((rounded.double() - exact).abs() / exact).max() > 1e-3
