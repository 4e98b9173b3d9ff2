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
