"""Hooks: order, arguments, mistakes."""

from functools import partial

import pytest

from utils.callbacks import HOOKS, Callbacks
from utils.errors import UserError


def test_functions_run_in_order_with_the_hooks_arguments():
    seen = []

    def remember(*args, **named):
        seen.append((args, named))

    callbacks = Callbacks()
    for number in (1, 2):
        callbacks.register_action("on_model_save", callback=partial(remember, number))
    callbacks.run("on_model_save", "last.pt", epoch=3)
    callbacks.run("on_train_start")
    assert seen == [((1, "last.pt"), {"epoch": 3}), ((2, "last.pt"), {"epoch": 3})]


def test_a_function_that_asks_for_the_trainer_is_given_the_run():
    class Hook:
        def __call__(self, values, trainer):
            seen.append((values, trainer))

    seen, callbacks = [], Callbacks()
    callbacks.register_action("on_model_save", callback=Hook())
    callbacks.register_action("on_model_save", callback=lambda values: seen.append(values))
    callbacks.register_action("on_model_save", callback=max)  # tells no parameters
    callbacks.run("on_model_save", [1])
    callbacks.trainer = "the run"
    callbacks.run("on_model_save", [2])
    assert seen == [([1], None), [1], ([2], "the run"), [2]]


def test_actions_are_listed_by_name_and_belong_to_one_run():
    callbacks = Callbacks()
    callbacks.register_action("teardown", name="mine", callback=print)
    assert callbacks.get_registered_actions("teardown") == [("mine", print)]
    assert list(callbacks.get_registered_actions()) == list(HOOKS)
    assert Callbacks().get_registered_actions("teardown") == [] and Callbacks().stop_training is False


@pytest.mark.parametrize(
    "use",
    [
        lambda callbacks: callbacks.run("on_train_ends"),
        lambda callbacks: callbacks.register_action("on_train_ends", callback=print),
        lambda callbacks: callbacks.get_registered_actions("on_train_ends"),
    ],
)
def test_unknown_hook_names_the_nearest(use):
    with pytest.raises(UserError, match="unknown hook 'on_train_ends'. Did you mean 'on_train_end'"):
        use(Callbacks())


def test_only_functions_can_be_registered():
    with pytest.raises(UserError, match="a function is expected"):
        Callbacks().register_action("teardown", callback="print")


def test_an_error_in_a_function_is_not_hidden():
    callbacks = Callbacks()
    callbacks.register_action("teardown", callback=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        callbacks.run("teardown")
