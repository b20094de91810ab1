"""Every undocumented DeepSpeed name that the ZeRO-3 seam leans on, so that a new release fails here, by name."""

import inspect

import deepspeed
import pytest
from deepspeed.runtime.zero import partition_parameters as partition
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

VERSION = deepspeed.__version__


def test_a_coordinator_takes_what_we_give_it():
    found = set(inspect.signature(PartitionedParameterCoordinator.__init__).parameters)
    given = {
        "prefetch_bucket_sz", "max_reuse_distance_in_numel", "max_available_parameters_in_numel", "allgather_stream",
        "inflight_param_registry", "prefetch_nvme", "timers", "zero_quantized_weights",
        "zero_quantized_nontrainable_weights", "fast_sharding_for_leaf_module", "log_trace_cache_warnings",
    }  # fmt: skip
    required = {
        name
        for name, parameter in inspect.signature(PartitionedParameterCoordinator.__init__).parameters.items()
        if parameter.default is parameter.empty and name != "self"
    }
    assert given <= found and required <= given, f"DeepSpeed {VERSION}: {found}"


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (PartitionedParameterCoordinator, "self.__all_gather_params(params_to_fetch, forward)"),
        (PartitionedParameterCoordinator, "self.__all_gather_params(params_to_prefetch, forward)"),
        (PartitionedParameterCoordinator, "with get_accelerator().stream(self.__allgather_stream):"),
        (PartitionedParameterCoordinator, "self.__inflight_param_registry[param] = handle"),
        (PartitionedParameterCoordinator, "self.__n_available_params += all_gather_numel"),
        (PartitionedParameterCoordinator, "self.__inflight_param_registry.pop(param).wait(handle_dependency="),
        (partition.Init, "p.ds_tensor.to(get_accelerator().current_device_name())"),
        (PartitionedParameterCoordinator, "self.__param_queue = collections.deque("),
        (PartitionedParameterCoordinator, "def fetch_sub_module(self, current_submodule: Module, forward: bool)"),
        (PartitionedParameterCoordinator, "def release_sub_module(self, submodule: Module, forward=False)"),
        (PartitionedParameterCoordinator, "for module in self.__submodule_order[step_id:]:"),
        (PartitionedParameterCoordinator, "if params_traversed >= self.__max_reuse_dist_in_numel:"),
        (PartitionedParameterCoordinator, "self.__step_id += 1"),
        (PartitionedParameterCoordinator, "for p in submodule.ds_recompute_parameters"),
        (PartitionedParameterCoordinator, "def is_complete_trace"),
        (PartitionedParameterCoordinator, "def is_invalid_trace"),
        (DeepSpeedZeRoOffload, "self.get_param_coordinator().reset_step()"),
        (DeepSpeedZeRoOffload, "return self.param_coordinator"),
        (DeepSpeedZeRoOffload, "self.__allgather_stream ="),
        (DeepSpeedZeRoOffload, "self.__inflight_param_registry ="),
        (DeepSpeedZeRoOffload, "self._prefetch_bucket_sz ="),
        (DeepSpeedZeRoOffload, "self._max_reuse_distance_in_numel ="),
        (DeepSpeedZeRoOffload, "self._max_available_parameters_in_numel ="),
        (DeepSpeedZeRoOffload, "module.pre_bwd_fn ="),
        (DeepSpeedZeRoOffload, "module.post_bwd_fn ="),
        (DeepSpeedZeRoOffload, "non_zero_params = [p for p in module.parameters() if not is_zero_param(p)]"),
        (partition.Init, "param.ds_tensor.ds_numel = partition_size"),
        (partition.Init, "param.ds_tensor.status = PartitionedParamStatus.AVAILABLE"),
        (partition.Init, "param.ds_tensor.final_location = final_location"),
        (partition.Init, "param.ds_numel_aligned = tensor_size"),
        (partition.Init, "param.ds_zero_partition_rank ="),
        (partition.Init, "param.ds_zero_partition_world_size ="),
        (partition.Init, "param.ds_process_group ="),
        (partition.Init, "def _convert_to_deepspeed_param(self, param)"),
        (partition.Init, "self.local_device ="),
        (partition.Init, "self.remote_device ="),
        (partition.InsertPostInitMethodToModuleSubClasses, "InsertPostInitMethodToModuleSubClasses.linear_bk ="),
    ],
)  # fmt: skip
def test_deepspeed_still_has_what_we_use(cls, text):
    assert text in inspect.getsource(cls), f"DeepSpeed {VERSION}: {cls.__name__} no longer has {text!r}"
