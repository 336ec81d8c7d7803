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
    WORKER_CHANGE_TYPE_LOAD: _ClassVar[WorkerChangeType]
WORKER_CHANGE_TYPE_UNSPECIFIED: WorkerChangeType
WORKER_CHANGE_TYPE_ADDED: WorkerChangeType
WORKER_CHANGE_TYPE_UPDATED: WorkerChangeType
WORKER_CHANGE_TYPE_REMOVED: WorkerChangeType
WORKER_CHANGE_TYPE_LOAD: WorkerChangeType

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
    __slots__ = ("time_to_live", "heartbeat_interval", "drain", "undrain")
    TIME_TO_LIVE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    UNDRAIN_FIELD_NUMBER: _ClassVar[int]
    time_to_live: _duration_pb2.Duration
    heartbeat_interval: _duration_pb2.Duration
    drain: DrainOrder
    undrain: bool
    def __init__(self, time_to_live: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., heartbeat_interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., drain: _Optional[_Union[DrainOrder, _Mapping]] = ..., undrain: _Optional[bool] = ...) -> None: ...

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
    __slots__ = ("model", "page_size", "page_token", "states", "labels", "worker_id_prefix")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_PREFIX_FIELD_NUMBER: _ClassVar[int]
    model: str
    page_size: int
    page_token: str
    states: _containers.RepeatedScalarFieldContainer[_generation_pb2.WorkerState]
    labels: _containers.ScalarMap[str, str]
    worker_id_prefix: str
    def __init__(self, model: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., states: _Optional[_Iterable[_Union[_generation_pb2.WorkerState, str]]] = ..., labels: _Optional[_Mapping[str, str]] = ..., worker_id_prefix: _Optional[str] = ...) -> None: ...

class ListWorkersResponse(_message.Message):
    __slots__ = ("workers", "next_page_token")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    next_page_token: str
    def __init__(self, workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GetWorkerRequest(_message.Message):
    __slots__ = ("worker_id",)
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    def __init__(self, worker_id: _Optional[str] = ...) -> None: ...

class GetWorkerResponse(_message.Message):
    __slots__ = ("worker",)
    WORKER_FIELD_NUMBER: _ClassVar[int]
    worker: Worker
    def __init__(self, worker: _Optional[_Union[Worker, _Mapping]] = ...) -> None: ...

class WatchWorkersRequest(_message.Message):
    __slots__ = ("model", "resume_version", "exclude_load")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RESUME_VERSION_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_LOAD_FIELD_NUMBER: _ClassVar[int]
    model: str
    resume_version: str
    exclude_load: bool
    def __init__(self, model: _Optional[str] = ..., resume_version: _Optional[str] = ..., exclude_load: _Optional[bool] = ...) -> None: ...

class WatchWorkersResponse(_message.Message):
    __slots__ = ("changes", "version", "snapshot")
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedCompositeFieldContainer[WorkerChange]
    version: str
    snapshot: bool
    def __init__(self, changes: _Optional[_Iterable[_Union[WorkerChange, _Mapping]]] = ..., version: _Optional[str] = ..., snapshot: _Optional[bool] = ...) -> None: ...

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
    __slots__ = ("page_size", "page_token", "name_prefix", "base_model")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NAME_PREFIX_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    name_prefix: str
    base_model: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., name_prefix: _Optional[str] = ..., base_model: _Optional[str] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "next_page_token")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[FleetModel]
    next_page_token: str
    def __init__(self, models: _Optional[_Iterable[_Union[FleetModel, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class FleetModel(_message.Message):
    __slots__ = ("model", "worker_count")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WORKER_COUNT_FIELD_NUMBER: _ClassVar[int]
    model: _generation_pb2.ModelInfo
    worker_count: int
    def __init__(self, model: _Optional[_Union[_generation_pb2.ModelInfo, _Mapping]] = ..., worker_count: _Optional[int] = ...) -> None: ...

class PickWorkerRequest(_message.Message):
    __slots__ = ("model", "session_key", "excluded_worker_ids", "lora_adapter", "capabilities")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SESSION_KEY_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    LORA_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    model: str
    session_key: str
    excluded_worker_ids: _containers.RepeatedScalarFieldContainer[str]
    lora_adapter: str
    capabilities: _containers.RepeatedScalarFieldContainer[_generation_pb2.Capability]
    def __init__(self, model: _Optional[str] = ..., session_key: _Optional[str] = ..., excluded_worker_ids: _Optional[_Iterable[str]] = ..., lora_adapter: _Optional[str] = ..., capabilities: _Optional[_Iterable[_Union[_generation_pb2.Capability, str]]] = ...) -> None: ...

class PickWorkerResponse(_message.Message):
    __slots__ = ("address", "worker_id", "instance_id", "pick_id", "time_to_live")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    PICK_ID_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_LIVE_FIELD_NUMBER: _ClassVar[int]
    address: str
    worker_id: str
    instance_id: str
    pick_id: str
    time_to_live: _duration_pb2.Duration
    def __init__(self, address: _Optional[str] = ..., worker_id: _Optional[str] = ..., instance_id: _Optional[str] = ..., pick_id: _Optional[str] = ..., time_to_live: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ReleasePickRequest(_message.Message):
    __slots__ = ("pick_id",)
    PICK_ID_FIELD_NUMBER: _ClassVar[int]
    pick_id: str
    def __init__(self, pick_id: _Optional[str] = ...) -> None: ...

class ReleasePickResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ContinueStreamRequest(_message.Message):
    __slots__ = ("pick", "place", "worker_id", "status_code", "status_details", "started", "loss_count", "parked", "model_fingerprint", "backend", "unread")
    PICK_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_CODE_FIELD_NUMBER: _ClassVar[int]
    STATUS_DETAILS_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    LOSS_COUNT_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    UNREAD_FIELD_NUMBER: _ClassVar[int]
    pick: str
    place: str
    worker_id: str
    status_code: int
    status_details: str
    started: bool
    loss_count: int
    parked: bool
    model_fingerprint: str
    backend: str
    unread: bool
    def __init__(self, pick: _Optional[str] = ..., place: _Optional[str] = ..., worker_id: _Optional[str] = ..., status_code: _Optional[int] = ..., status_details: _Optional[str] = ..., started: _Optional[bool] = ..., loss_count: _Optional[int] = ..., parked: _Optional[bool] = ..., model_fingerprint: _Optional[str] = ..., backend: _Optional[str] = ..., unread: _Optional[bool] = ...) -> None: ...

class ContinueStreamResponse(_message.Message):
    __slots__ = ("place", "cluster", "ask_again", "status_code", "status_message", "status_details", "last_message")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    ASK_AGAIN_FIELD_NUMBER: _ClassVar[int]
    STATUS_CODE_FIELD_NUMBER: _ClassVar[int]
    STATUS_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STATUS_DETAILS_FIELD_NUMBER: _ClassVar[int]
    LAST_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    place: str
    cluster: str
    ask_again: bool
    status_code: int
    status_message: str
    status_details: str
    last_message: bytes
    def __init__(self, place: _Optional[str] = ..., cluster: _Optional[str] = ..., ask_again: _Optional[bool] = ..., status_code: _Optional[int] = ..., status_message: _Optional[str] = ..., status_details: _Optional[str] = ..., last_message: _Optional[bytes] = ...) -> None: ...

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

class UndrainWorkerRequest(_message.Message):
    __slots__ = ("worker_id",)
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    def __init__(self, worker_id: _Optional[str] = ...) -> None: ...

class UndrainWorkerResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

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
