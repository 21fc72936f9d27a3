"""JSON of a model folder: a name that appears twice is told, however many there are."""

import time

import pytest

from edgekv.errors import ModelError
from edgekv.model.json_fields import parse_object


def test_a_name_that_appears_twice_is_found_in_one_pass() -> None:
    names = ",".join(f'"{i:x}":0' for i in range(100_000))
    began = time.thread_time()
    with pytest.raises(ModelError, match=r"^header: not usable JSON: the name 'twin' appears twice$"):
        parse_object(f'{{{names},"twin":0,"twin":0}}'.encode(), "header")
    assert time.thread_time() - began < 2


def test_the_first_of_several_is_named_and_only_its_beginning() -> None:
    with pytest.raises(ModelError, match="the name 'b' appears twice"):
        parse_object(b'{"a":0,"b":0,"b":1,"a":1}', "header")
    with pytest.raises(ModelError) as caught:
        parse_object(b'{"%s":0,"%s":1}' % (b"x" * 10_000, b"x" * 10_000), "header")
    assert len(str(caught.value)) < 200
