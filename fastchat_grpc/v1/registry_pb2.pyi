import datetime

from fastchat_grpc.v1 import generation_pb2 as _generation_pb2
from google.api import annotations_pb2 as _annotations_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerChangeType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_CHANGE_TYPE_UNSPECIFIED: _ClassVar[WorkerChangeType]
    WORKER_CHANGE_TYPE_ADDED: _ClassVar[WorkerChangeType]
    WORKER_CHANGE_TYPE_UPDATED: _ClassVar[WorkerChangeType]
    WORKER_CHANGE_TYPE_REMOVED: _ClassVar[WorkerChangeType]
WORKER_CHANGE_TYPE_UNSPECIFIED: WorkerChangeType
WORKER_CHANGE_TYPE_ADDED: WorkerChangeType
WORKER_CHANGE_TYPE_UPDATED: WorkerChangeType
WORKER_CHANGE_TYPE_REMOVED: WorkerChangeType

class RegisterRequest(_message.Message):
    __slots__ = ("worker_id", "instance_id", "address", "models", "weight", "load", "labels", "check_heartbeat", "version")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    CHECK_HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    instance_id: str
    address: str
    models: _containers.RepeatedCompositeFieldContainer[_generation_pb2.ModelInfo]
    weight: float
    load: _generation_pb2.WorkerLoad
    labels: _containers.ScalarMap[str, str]
    check_heartbeat: bool
    version: str
    def __init__(self, worker_id: _Optional[str] = ..., instance_id: _Optional[str] = ..., address: _Optional[str] = ..., models: _Optional[_Iterable[_Union[_generation_pb2.ModelInfo, _Mapping]]] = ..., weight: _Optional[float] = ..., load: _Optional[_Union[_generation_pb2.WorkerLoad, _Mapping]] = ..., labels: _Optional[_Mapping[str, str]] = ..., check_heartbeat: _Optional[bool] = ..., version: _Optional[str] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("lease_id", "time_to_live", "heartbeat_interval")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_LIVE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    time_to_live: _duration_pb2.Duration
    heartbeat_interval: _duration_pb2.Duration
    def __init__(self, lease_id: _Optional[str] = ..., time_to_live: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., heartbeat_interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("lease_id", "load")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    load: _generation_pb2.WorkerLoad
    def __init__(self, lease_id: _Optional[str] = ..., load: _Optional[_Union[_generation_pb2.WorkerLoad, _Mapping]] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("time_to_live", "heartbeat_interval", "drain")
    TIME_TO_LIVE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    time_to_live: _duration_pb2.Duration
    heartbeat_interval: _duration_pb2.Duration
    drain: DrainOrder
    def __init__(self, time_to_live: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., heartbeat_interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., drain: _Optional[_Union[DrainOrder, _Mapping]] = ...) -> None: ...

class DrainOrder(_message.Message):
    __slots__ = ("timeout",)
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    timeout: _duration_pb2.Duration
    def __init__(self, timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class DeregisterRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    def __init__(self, lease_id: _Optional[str] = ...) -> None: ...

class DeregisterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListWorkersRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ListWorkersResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    def __init__(self, workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ...) -> None: ...

class WatchWorkersRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class WatchWorkersResponse(_message.Message):
    __slots__ = ("changes",)
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedCompositeFieldContainer[WorkerChange]
    def __init__(self, changes: _Optional[_Iterable[_Union[WorkerChange, _Mapping]]] = ...) -> None: ...

class WorkerChange(_message.Message):
    __slots__ = ("type", "worker")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    type: WorkerChangeType
    worker: Worker
    def __init__(self, type: _Optional[_Union[WorkerChangeType, str]] = ..., worker: _Optional[_Union[Worker, _Mapping]] = ...) -> None: ...

class Worker(_message.Message):
    __slots__ = ("worker_id", "instance_id", "address", "models", "weight", "load", "labels", "check_heartbeat", "reserved_count", "heartbeat_age", "suspect", "version")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    CHECK_HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    RESERVED_COUNT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_AGE_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    instance_id: str
    address: str
    models: _containers.RepeatedCompositeFieldContainer[_generation_pb2.ModelInfo]
    weight: float
    load: _generation_pb2.WorkerLoad
    labels: _containers.ScalarMap[str, str]
    check_heartbeat: bool
    reserved_count: int
    heartbeat_age: _duration_pb2.Duration
    suspect: bool
    version: str
    def __init__(self, worker_id: _Optional[str] = ..., instance_id: _Optional[str] = ..., address: _Optional[str] = ..., models: _Optional[_Iterable[_Union[_generation_pb2.ModelInfo, _Mapping]]] = ..., weight: _Optional[float] = ..., load: _Optional[_Union[_generation_pb2.WorkerLoad, _Mapping]] = ..., labels: _Optional[_Mapping[str, str]] = ..., check_heartbeat: _Optional[bool] = ..., reserved_count: _Optional[int] = ..., heartbeat_age: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., suspect: _Optional[bool] = ..., version: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[FleetModel]
    def __init__(self, models: _Optional[_Iterable[_Union[FleetModel, _Mapping]]] = ...) -> None: ...

class FleetModel(_message.Message):
    __slots__ = ("model", "worker_count")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WORKER_COUNT_FIELD_NUMBER: _ClassVar[int]
    model: _generation_pb2.ModelInfo
    worker_count: int
    def __init__(self, model: _Optional[_Union[_generation_pb2.ModelInfo, _Mapping]] = ..., worker_count: _Optional[int] = ...) -> None: ...

class GetWorkerAddressRequest(_message.Message):
    __slots__ = ("model", "session_key", "excluded_worker_ids")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SESSION_KEY_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    model: str
    session_key: str
    excluded_worker_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., session_key: _Optional[str] = ..., excluded_worker_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class GetWorkerAddressResponse(_message.Message):
    __slots__ = ("address", "worker_id", "instance_id")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    address: str
    worker_id: str
    instance_id: str
    def __init__(self, address: _Optional[str] = ..., worker_id: _Optional[str] = ..., instance_id: _Optional[str] = ...) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker_id", "timeout")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    timeout: _duration_pb2.Duration
    def __init__(self, worker_id: _Optional[str] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class DrainWorkerResponse(_message.Message):
    __slots__ = ("running_count",)
    RUNNING_COUNT_FIELD_NUMBER: _ClassVar[int]
    running_count: int
    def __init__(self, running_count: _Optional[int] = ...) -> None: ...

class RefreshWorkersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RefreshWorkersResponse(_message.Message):
    __slots__ = ("live_worker_ids", "removed_worker_ids")
    LIVE_WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    REMOVED_WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    live_worker_ids: _containers.RepeatedScalarFieldContainer[str]
    removed_worker_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, live_worker_ids: _Optional[_Iterable[str]] = ..., removed_worker_ids: _Optional[_Iterable[str]] = ...) -> None: ...
