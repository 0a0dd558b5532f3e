"""What a user may ask for: checked on the server, explained in one line each."""

import pytest

from app.params import MAX_SEED, Grid, read_request
from odvae.runtime.errors import UserError

GOOD = {"prompt": "a red circle"}


@pytest.mark.parametrize("seconds", [0.01, 0.3, 1, 2.1, 4, 9.99, 10, 37.3])
def test_frames_are_the_nearest_on_the_grid(seconds):
    grid = Grid(frame_rate=8.0, stride=4)
    frames = grid.frames_for(seconds)
    assert frames >= 1 and (frames - 1) % 4 == 0
    for other in (frames - 4, frames + 4):
        assert other < 1 or abs(frames - seconds * 8) <= abs(other - seconds * 8)


def test_ten_seconds_are_81_frames():
    assert Grid(frame_rate=8.0, stride=4).frames_for(10) == 81


@pytest.mark.parametrize("seed", [None, "", " ", -1])
def test_no_seed_draws_one_that_is_then_known(seed):
    drawn = {read_request({**GOOD, "seed": seed}).settle(Grid(), 60).seed for _ in range(8)}
    assert len(drawn) > 1 and all(0 <= value <= MAX_SEED for value in drawn)


def test_given_values_are_used_and_text_is_trimmed():
    asked = {"prompt": "  a cat \n", "seed": 7, "seconds": 2, "steps": 5, "guidance": 1}
    params = read_request(asked).settle(Grid(), 60)
    assert (params.prompt, params.seed, params.frames, params.steps, params.guidance) == ("a cat", 7, 17, 5, 1.0)


def test_settings_move_to_another_grid_with_their_playing_time():
    params = read_request({**GOOD, "seconds": 4}).settle(Grid(8.0, 4), 60)
    moved = params.on(Grid(16.0, 8))
    assert (moved.frames - 1) % 8 == 0 and abs(moved.seconds - params.seconds) <= 0.25
    assert params.on(Grid(8.0, 4)) is params


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"prompt": "  "}, "prompt: is empty"),
        ({"prompt": "x" * 1001}, "1001 characters"),
        ({"seed": -2}, "seed: must be at least -1"),
        ({"seed": 1.5}, "seed: must be a whole number"),
        ({"seed": "abc"}, "seed: must be a whole number"),
        ({"seed": MAX_SEED + 1}, "seed: must be at most"),
        ({"seconds": 0}, "seconds: must be more than 0"),
        ({"seconds": float("nan")}, "seconds: must be a number"),
        ({"seconds": float("inf")}, "seconds: must be a number"),
        ({"steps": 0}, "steps: must be at least 1"),
        ({"steps": None}, "steps: must be a whole number"),
        ({"guidance": -1}, "guidance: must be at least 0"),
        ({"folder": "/etc"}, "folder: there is no such setting"),
    ],
)
def test_wrong_values_are_named(wrong, told):
    with pytest.raises(UserError, match=told):
        read_request({**GOOD, **wrong})


def test_every_wrong_value_is_told_at_once():
    with pytest.raises(UserError, match=r"(?s)prompt.*steps"):
        read_request({"prompt": "", "steps": 0})


def test_too_long_for_this_server():
    with pytest.raises(UserError, match="seconds: at most 60 here, but 61 was asked"):
        read_request({**GOOD, "seconds": 61}).settle(Grid(), 60)
