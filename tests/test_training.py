"""Training: reproducible, side-effect free, and a base model whose cache is never trusted blindly."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lab import cache, models
from lora_lab.data import Digits, mnist
from lora_lab.models import MLP, base_model, count_parameters
from lora_lab.training import accuracy, fit, logits


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(0)
    return Digits(torch.randn(50, 6, generator=g), torch.randint(0, 3, (50,), generator=g))


def network(dropout=0.0, seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def train(data, *, dropout=0.0, **options):
    model = network(dropout)
    history = fit(model, data, **dict(seed=0, lr=0.01, steps=12, batch_size=8, label=None) | options)
    return model, history


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# --- fit --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_same_seed_gives_the_same_bits(data, dropout):
    first, history = train(data, dropout=dropout)
    torch.manual_seed(99)  # whatever the caller does in between
    second, again = train(data, dropout=dropout)
    assert equal(first, second) and history == again
    assert not equal(first, train(data, dropout=dropout, seed=5)[0])


def test_the_seed_decides_the_dropout_too(data):
    everything = dict(dropout=0.5, batch_size=50, steps=1)  # one batch of all: the order plays no part
    assert not equal(train(data, **everything)[0], train(data, **everything, seed=5)[0])


def test_the_callers_random_state_is_untouched(data):
    model = network(0.5)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    fit(model, data, seed=0, lr=0.01, steps=3, label=None, watch=lambda m: torch.rand(1), watch_at=[0, 3])
    assert torch.equal(torch.get_rng_state(), before)


def test_watching_changes_nothing(data):
    def nosy(model):
        torch.rand(3)
        model.eval()

    plain, history = train(data, dropout=0.5)
    watched, same = train(data, dropout=0.5, watch=nosy, watch_at=range(13))
    assert equal(plain, watched) and history.loss == same.loss


def test_watch_sees_the_model_before_each_step_and_at_the_end(data):
    start = network()[0].weight.detach().clone()
    model, history = train(data, steps=4, watch=lambda m: m[0].weight.detach().clone(), watch_at=[4, 0, 2])
    assert list(history.watched) == [0, 2, 4]
    assert torch.equal(history.watched[0], start)
    assert torch.equal(history.watched[2], train(data, steps=4, watch=lambda m: m[0].weight.detach().clone(),
                                                 watch_at=[2])[1].watched[2])
    assert torch.equal(history.watched[4], model[0].weight)
    assert not torch.equal(history.watched[0], history.watched[2])


@pytest.mark.parametrize("options, steps", [(dict(steps=5), 5), (dict(steps=None, epochs=1), 7),
                                            (dict(steps=None, epochs=2.5), 18), (dict(steps=1), 1)])
def test_number_of_steps(data, options, steps):
    assert len(train(data, **options)[1].loss) == steps  # 50 examples in batches of 8: 7 an epoch


def test_an_epoch_is_every_example_once(data):
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            seen.append(x)
            return self.layer(x)

    fit(Spy(), data, seed=0, lr=0.01, epochs=2, batch_size=8, label=None)
    assert [len(x) for x in seen] == [8, 8, 8, 8, 8, 8, 2] * 2
    epochs = torch.cat(seen[:7]), torch.cat(seen[7:])
    for epoch in epochs:
        assert torch.equal(epoch.sort(dim=0).values, data.x.sort(dim=0).values)
    assert not torch.equal(*epochs)


def test_the_loss_of_a_step_is_the_one_before_it(data):
    expected = nn.functional.cross_entropy(network()(data.x), data.y).item()
    assert train(data, batch_size=50, steps=1)[1].loss[0] == pytest.approx(expected, abs=1e-6)


def test_it_learns(data):
    easy = Digits(data.x, (data.x[:, 0] > 0).long() + (data.x[:, 1] > 0).long())
    model, history = train(easy, steps=None, epochs=60, lr=0.02)
    assert history.loss[0] > 0.9 and sum(history.loss[-7:]) / 7 < 0.3
    assert accuracy(model, easy).all > 0.95


def test_only_what_requires_a_gradient_changes(data):
    model = network()
    model[0].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, data, seed=0, lr=0.01, steps=3, label=None, weight_decay=0.1)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"3.weight", "3.bias"} and model[0].weight.grad is None


def step_sizes(history):
    weights = list(history.watched.values())
    return [(b - a).abs().max().item() for a, b in zip(weights, weights[1:], strict=False)]


def test_the_learning_rate_goes_up_and_down(data):
    sizes = step_sizes(train(data, steps=20, watch=lambda m: m[3].bias.detach().clone(), watch_at=range(21),
                             batch_size=50)[1])
    assert sizes[0] < 0.1 * max(sizes) and sizes[-1] < 0.1 * max(sizes)
    assert sizes[0] == pytest.approx(0.01 / 25, rel=1e-2)  # one cycle starts at lr / 25; Adam's first step is lr itself


def test_weight_decay_shrinks(data):
    sizes = [sum(p.square().sum().item() for p in train(data, weight_decay=w, lr=0.05)[0].parameters()) for w in (0, 1)]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("mode", [True, False])
def test_the_models_mode_is_given_back(data, mode):
    model = network().train(mode)
    fit(model, data, seed=0, lr=0.01, steps=1, label=None)
    assert model.training is mode
    logits(model, data.x)
    assert model.training is mode
    with pytest.raises(KeyboardInterrupt):  # as by JupyterLab's stop button
        fit(model, data, seed=0, lr=0.01, steps=3, label=None, watch=interrupt, watch_at=[1])
    with pytest.raises(RuntimeError):
        logits(model, data.x[:, :5])
    assert model.training is mode


def interrupt(model):
    model.train(not model.training)
    raise KeyboardInterrupt


@pytest.mark.parametrize("options, message", [
    (dict(steps=None), "either epochs or steps"), (dict(epochs=1), "either epochs or steps"),
    (dict(steps=0), "0 steps"), (dict(steps=None, epochs=0.01), "0 steps"), (dict(batch_size=0), "batch_size is 0"),
    (dict(watch_at=[0]), "there is no watch")])
def test_settings_that_cannot_be(data, options, message):
    with pytest.raises(ValueError, match=message):
        train(data, **options)


def test_nothing_to_train_or_to_train_on(data):
    with pytest.raises(ValueError, match="frozen"):
        fit(network().requires_grad_(False), data, seed=0, lr=0.01, steps=1)
    with pytest.raises(ValueError, match="at least one: got 0 and 0"):
        train(data.only((7,)))
    with pytest.raises(ValueError, match="got 50 and 49"):
        train(Digits(data.x, data.y[1:]))


# --- logits and accuracy ----------------------------------------------------------------------------------------

def test_logits_do_not_depend_on_the_batches(data):
    model = network(0.5)
    out = logits(model, data.x, batch_size=7)
    assert not out.requires_grad and out.shape == (50, 3)
    torch.testing.assert_close(out, model.eval()(data.x))


class Says(nn.Module):
    """Answers with the first number of each example."""

    def forward(self, x):
        return nn.functional.one_hot(x[:, 0].long(), 10).float()


def shares(answers, labels):
    return accuracy(Says(), Digits(torch.tensor(answers, dtype=torch.float).view(-1, 1), torch.tensor(labels)))


def test_accuracy_by_group():
    got = shares([0, 1, 1, 3, 8, 9, 8, 9], [0, 0, 1, 3, 8, 8, 9, 9])
    assert (got.old, got.new, got.all) == (0.75, 0.5, 0.625)
    assert got.digits[0] == 0.5 and got.digits[1] == 1 and got.digits[8] == 0.5 and got.digits[9] == 0.5
    assert all(math.isnan(got.digits[d]) for d in (2, 4, 5, 6, 7)) and len(got.digits) == 10


def test_a_group_without_examples_is_nan():
    only_new, only_old = shares([8, 8], [8, 9]), shares([1], [1])
    assert math.isnan(only_new.old) and (only_new.new, only_new.all) == (0.5, 0.5)
    assert math.isnan(only_old.new) and (only_old.old, only_old.all) == (1, 1)


# --- the base model ---------------------------------------------------------------------------------------------

def test_535_818_parameters():
    assert count_parameters(MLP()) == (535_818, 535_818, 0)


def test_the_base_model_has_never_met_8_and_9():
    reached = accuracy(base_model(), mnist()[1])
    assert reached.digits[8] == 0 and reached.digits[9] == 0 and reached.new == 0
    assert reached.old > 0.975 and min(reached.digits[:8]) > 0.94


def test_taught_8_alone_it_reads_no_9():  # what notebook 04's exercise 7 has the reader predict
    only_8 = base_model()
    fit(only_8, mnist()[0].only([8]), seed=0, epochs=1, lr=1e-3)
    reached = accuracy(only_8, mnist()[1])
    assert reached.digits[9] < 0.005 and reached.digits[8] > 0.97 and reached.old < 0.1


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """How often base_model trains, on a few examples and into an empty cache."""
    g = torch.Generator().manual_seed(0)
    few = Digits(torch.randn(40, 784, generator=g), torch.arange(10).repeat(4))
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "mnist", lambda: (few, few))
    calls, real = [], models.fit

    def counted(model, data, **settings):
        calls.append(sorted(set(data.y.tolist())))
        return real(model, data, **settings)

    monkeypatch.setattr(models, "fit", counted)
    return calls


def test_a_kept_model_is_reused(trained, tmp_path):
    first, second = base_model(epochs=1), base_model(epochs=1)
    assert trained == [list(range(8))]  # once, on the old digits
    assert equal(first, second) and first is not second and not first.training and not second.training
    second.fc1.weight.data.zero_()
    assert equal(first, base_model(epochs=1))
    assert len(list(tmp_path.iterdir())) == 1


def test_the_callers_random_state_is_untouched_by_the_base_model(trained):
    before = torch.get_rng_state()
    base_model(epochs=1)
    base_model(epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("other", [dict(seed=1), dict(epochs=2), dict(batch_size=16), dict(lr=1e-3)])
def test_every_setting_has_its_own_file(trained, tmp_path, other):
    settings = dict(seed=0, epochs=1, batch_size=8, lr=1e-2)
    models_made = base_model(**settings), base_model(**settings | other)
    assert len(trained) == 2 and len(list(tmp_path.iterdir())) == 2
    assert not equal(*models_made)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def reshape(path):
    weights = {name: w[:5].clone() for name, w in load_file(path).items()}
    save_file(weights, path)


def of_another_seed(path):
    base_model(**SETTINGS | {"seed": 1})
    other = next(p for p in path.parent.iterdir() if p != path)
    other.replace(path)


SETTINGS = dict(seed=0, epochs=1, batch_size=8, lr=1e-2)
HARMS = {
    "a bit in the middle": flip_a_bit,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "truncated in its header": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "empty": lambda path: path.write_bytes(b""),
    "a foreign file": lambda path: path.write_text("<html>Not found</html>" * 10),
    "other tensors": lambda path: save_file({name: w + 1 for name, w in load_file(path).items()}, path),
    "other shapes": reshape,
    "other settings": of_another_seed,
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_a_file_that_is_not_the_model_is_not_trusted(trained, harm):
    good = base_model(**SETTINGS)
    path, = cache.folder().iterdir()
    harm(path)
    trained.clear()
    assert equal(good, base_model(**SETTINGS)) and len(trained) == 1
    assert equal(good, base_model(**SETTINGS)) and len(trained) == 1  # the file is whole again


def test_a_save_that_is_cut_short_leaves_nothing(trained, tmp_path, monkeypatch):
    def full_disk(path, content):
        path.write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    model = base_model(epochs=1)
    assert isinstance(model, MLP) and not model.training
    assert not list(tmp_path.iterdir())
