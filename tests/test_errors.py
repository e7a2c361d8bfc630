import pytest

from vqgan.errors import InputError, user_input


def test_what_is_checked_for_a_user_becomes_the_users_error():
    with pytest.raises(InputError, match="^width=3 is odd$") as caught:
        with user_input():
            raise ValueError("width=3 is odd")
    assert type(caught.value.__cause__) is ValueError


def test_other_faults_are_not_the_users():
    with pytest.raises(ZeroDivisionError):
        with user_input():
            raise ZeroDivisionError
    assert issubclass(InputError, ValueError)
