from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest


def test_an_uploaded_file_can_be_read_back_byte_by_byte(live):
    content = b'{"messages": []}\r\n\xff\x00'
    file = live.upload(content)
    assert live.client.files.content(file.id).read() == content
    assert (file.bytes, file.filename, file.status) == (len(content), "train.jsonl", "processed")
    assert live.client.files.retrieve(file.id) == file
    assert live.client.files.wait_for_processing(file.id, max_wait_seconds=1) == file


def test_a_client_that_accepts_only_json_still_gets_the_bytes(live):
    file = live.upload(b"plain")
    reply = httpx.get(f"{live.url}/v1/files/{file.id}/content", headers={"accept": "application/json"})
    assert reply.content == b"plain"


def test_paging_through_files_meets_each_one_once_newest_first(live):
    ids = [live.upload(name=f"{number}.jsonl").id for number in range(5)]
    live.upload(name="other.txt", purpose="batch")
    assert [file.id for file in live.client.files.list(limit=2, purpose="fine-tune")] == ids[::-1]
    assert [file.id for file in live.client.files.list(limit=2, purpose="fine-tune", order="asc")] == ids


def test_a_deleted_file_is_gone_with_its_bytes(live):
    file = live.upload()
    assert live.client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError, match="No such File object") as raised:
        live.client.files.retrieve(file.id)
    assert raised.value.param == "id"
    assert list(live.blobs.keys("files")) == []


def test_only_the_base_name_of_a_client_path_is_kept(live):
    assert live.upload(name="/home/me/../secret/train.jsonl").filename == "train.jsonl"
    assert live.upload(name="data\\train.jsonl").filename == "train.jsonl"


def test_a_training_file_must_end_in_jsonl(live):
    with pytest.raises(openai.BadRequestError, match=r"Must be \.jsonl"):
        live.upload(name="train.csv")
    assert live.upload(name="train.csv", purpose="user_data").filename == "train.csv"


def test_an_unknown_purpose_is_refused_by_name(live):
    with pytest.raises(openai.BadRequestError) as raised:
        live.upload(purpose="fun")
    assert (raised.value.param, raised.value.code) == ("purpose", "invalid_value")
    assert "'fine-tune'" in raised.value.message


def test_a_missing_file_part_is_named(live):
    reply = httpx.post(f"{live.url}/v1/files", data={"purpose": "batch"})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, "file", "missing_required_parameter")


def test_expires_after_is_accepted(live):
    file = live.upload(expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at is None


def test_a_file_over_the_limit_is_a_413(start):
    live = start(max_file_bytes=100)
    with pytest.raises(openai.APIStatusError, match="takes up to 100") as raised:
        live.upload(b"x" * 101)
    assert (raised.value.status_code, raised.value.code) == (413, "content_too_large")
    assert live.upload(b"x" * 100).bytes == 100


def test_a_body_far_over_the_limit_is_a_413_with_an_envelope(start):
    live = start(max_file_bytes=100)
    with pytest.raises(openai.APIStatusError) as raised:
        live.upload(b"x" * (3 << 20))
    assert (raised.value.status_code, raised.value.code) == (413, "content_too_large")


def test_a_body_that_hides_its_length_is_stopped_as_it_grows(start):
    live = start(max_file_bytes=100)
    boundary = "multipart/form-data; boundary=x"
    blocks = [
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n',
        *[b"x" * 65536] * 20,
    ]
    reply = httpx.post(f"{live.url}/v1/files", content=iter(blocks), headers={"content-type": boundary})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "content_too_large")


def test_eight_uploads_at_once_are_all_kept(live):
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda number: live.upload(b"x" * number, f"{number}.jsonl"), range(1, 9)))
    assert [file.bytes for file in files] == list(range(1, 9))
    assert {file.id for file in live.client.files.list()} == {file.id for file in files}
