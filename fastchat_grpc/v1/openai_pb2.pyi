from fastchat_grpc.v1 import generation_pb2 as _generation_pb2
from google.api import annotations_pb2 as _annotations_pb2
from google.api import httpbody_pb2 as _httpbody_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListOpenAIModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetOpenAIModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ReplyPiece(_message.Message):
    __slots__ = ("start", "event", "complete", "prompt_index")
    START_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_INDEX_FIELD_NUMBER: _ClassVar[int]
    start: ReplyStart
    event: _generation_pb2.GenerateResponse
    complete: bool
    prompt_index: int
    def __init__(self, start: _Optional[_Union[ReplyStart, _Mapping]] = ..., event: _Optional[_Union[_generation_pb2.GenerateResponse, _Mapping]] = ..., complete: _Optional[bool] = ..., prompt_index: _Optional[int] = ...) -> None: ...

class ReplyStart(_message.Message):
    __slots__ = ("id", "created", "resume")
    ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    id: str
    created: int
    resume: _generation_pb2.Resume
    def __init__(self, id: _Optional[str] = ..., created: _Optional[int] = ..., resume: _Optional[_Union[_generation_pb2.Resume, _Mapping]] = ...) -> None: ...
