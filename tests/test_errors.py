import pytest

from vqgan.errors import InputError, file_input, user_input


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


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OverflowError, RecursionError])
def test_whatever_the_content_of_a_file_raises_is_one_line_with_its_reason(error):
    with pytest.raises(InputError, match=r"^a.pt is odd \(two lines\): name another$"):
        with file_input("a.pt is odd", ": name another"):
            raise error("two lines")
    with pytest.raises(InputError, match=r"^a.pt is odd \([x ]+\)$") as caught:
        with file_input("a.pt is odd"):
            raise error(1000 * "x\n")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_message_for_a_user_is_not_wrapped_in_another():
    with pytest.raises(InputError, match="^give others$"):
        with file_input("a.pt is odd"):
            raise InputError("give others")
