from vaescale.settings import load, without_bound


def test_it_is_said_that_losses_replace_a_likelihood() -> None:
    given = ["run=none", "data.root=none"]
    losses = [*given, "model.reconstruction.l1=1"]
    assert without_bound(load("tests/integration/tiny_kl.yaml", losses)).startswith("the run has no bits/dim, because")
    assert without_bound(load("tests/integration/tiny_kl.yaml", given)) == ""
    assert without_bound(load("tests/integration/tiny.yaml", losses)) == ""
    assert without_bound(load("tests/integration/tiny_vae.yaml", given)) == ""
