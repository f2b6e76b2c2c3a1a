import { IoUringPinner } from "../host/io-uring-pinner.ts";
import { IommufdPinner } from "../host/iommufd-pinner.ts";
import { SoftwarePinner } from "../host/software-pinner.ts";
import { VfioPinner } from "../host/vfio-pinner.ts";
import type { Pinner } from "../tracking/pinner.ts";

/** Where memory is pinned for a real device: fds of this process, which stay their owner's. */
export type DeviceSpace =
  | { readonly pinner: "vfio"; readonly container: number }
  | { readonly pinner: "iommufd"; readonly iommufd: number; readonly ioas: number };
export type DevicePinnerName = DeviceSpace["pinner"];
export type PinnerName = "io_uring" | "software" | DevicePinnerName;

/** What pins memory for devices of ours, or for a real one. Throws HostError. */
export function createPinner(name: PinnerName, space: DeviceSpace | undefined): Pinner {
  if (space?.pinner === "vfio") return new VfioPinner(space);
  if (space?.pinner === "iommufd") return new IommufdPinner(space);
  return name === "io_uring" ? new IoUringPinner() : new SoftwarePinner();
}
