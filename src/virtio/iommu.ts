import { DmaFault, HostError } from "../base/errors.ts";
import type { Bdf } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { Tracker } from "../tracking/tracker.ts";
import { VIRTIO_F_VERSION_1 } from "../wire/pci.ts";
import { completedBy } from "../wire/struct.ts";
import {
  ASSIGNED_BITMAP_SIZE,
  Config,
  PIN_CONTROL_OFF,
  PIN_CONTROL_ON,
  PIN_CONTROL_PARK,
  PIN_CONTROL_UNPARK,
  PIN_FLAG_COMPLETE,
  PIN_STATUS_OFF,
  PIN_STATUS_ON,
  PIN_STATUS_PARKED,
  PIN_STATUS_REFUSED,
  PinRange,
  ProbeResvMem,
  ReqHead,
  ReqPin,
  ReqProbe,
  ReqTail,
  VIRTIO_ID_IOMMU,
  VIRTIO_IOMMU_ATTACH_F_BYPASS,
  VIRTIO_IOMMU_F_BYPASS,
  VIRTIO_IOMMU_F_BYPASS_CONFIG,
  VIRTIO_IOMMU_F_DOMAIN_RANGE,
  VIRTIO_IOMMU_F_INPUT_RANGE,
  VIRTIO_IOMMU_F_MAP_UNMAP,
  VIRTIO_IOMMU_F_PIN_DIRTY,
  VIRTIO_IOMMU_F_PIN_PAGE,
  VIRTIO_IOMMU_F_PROBE,
  VIRTIO_IOMMU_PROBE_T_RESV_MEM,
  VIRTIO_IOMMU_RESV_MEM_T_MSI,
  VIRTIO_IOMMU_S_INVAL,
  VIRTIO_IOMMU_S_NOENT,
  VIRTIO_IOMMU_S_UNSUPP,
  VIRTIO_IOMMU_T_ATTACH,
  VIRTIO_IOMMU_T_DETACH,
  VIRTIO_IOMMU_T_MAP,
  VIRTIO_IOMMU_T_PIN,
  VIRTIO_IOMMU_T_PROBE,
  VIRTIO_IOMMU_T_UNMAP,
} from "../wire/virtio-iommu.ts";
import { type Assigned, gatesOf, type VirtioDevice } from "./device.ts";
import { FaultReports } from "./fault-reports.ts";
import { type InputRange, MSI_WINDOW, RemappingRequests } from "./iommu-requests.ts";
import { type Buffer, type Chain, lengthOf, MalformedChain, type SplitQueue, scatter } from "./queue.ts";

const REQUEST_QUEUE = 0;
export const EVENT_QUEUE = 1;
/** Descriptors per queue: a driver has one synchronous request of two buffers at a time. */
const QUEUE_SIZE = 64;
/** Ranges in one PIN request: covers the longest scatter list of our disk (126 segments) and its header. */
const PIN_BATCH_MAX = 128;
const REQUEST_MAX = ReqPin.size + PIN_BATCH_MAX * PinRange.size;
const PROBE_SIZE = 64;

const bit = (feature: number): bigint => 1n << BigInt(feature);
const has = (features: bigint, feature: number): boolean => (features & bit(feature)) !== 0n;

const pinQuota = (frames: number): bigint =>
  Number.isFinite(frames) ? BigInt(frames) : 0xffff_ffff_ffff_ffffn;

export interface VirtioIommuOptions {
  readonly memory: GuestMemory;
  readonly tracker: Tracker;
  readonly assigned: Assigned;
  /** Offer PIN_PAGE; otherwise the device is a plain virtio-iommu. */
  readonly pinPage: boolean;
  /** Told what the host refused while nobody waited for an answer. */
  hostError(error: HostError): void;
}

/**
 * virtio-iommu (VIRTIO 1.2 section 5.13) with the PIN_PAGE extension (docs/abi.md section 3).
 */
export class VirtioIommu implements VirtioDevice {
  readonly id = VIRTIO_ID_IOMMU;
  readonly features: bigint;
  readonly queueSizes = [QUEUE_SIZE, QUEUE_SIZE];
  readonly configSize = Config.size;
  readonly #o: VirtioIommuOptions;
  readonly #config = new Uint8Array(Config.size);
  readonly #request = new Uint8Array(REQUEST_MAX);
  readonly #remapping: RemappingRequests;
  readonly #reports: FaultReports;
  #negotiated = 0n;
  #pinStatus = PIN_STATUS_OFF;
  #badRequests = 0;
  configGeneration = 0;

  constructor(options: VirtioIommuOptions) {
    this.#o = options;
    this.features =
      bit(VIRTIO_F_VERSION_1) |
      bit(VIRTIO_IOMMU_F_INPUT_RANGE) |
      bit(VIRTIO_IOMMU_F_DOMAIN_RANGE) |
      bit(VIRTIO_IOMMU_F_MAP_UNMAP) |
      bit(VIRTIO_IOMMU_F_PROBE) |
      bit(VIRTIO_IOMMU_F_BYPASS_CONFIG) |
      (options.pinPage ? bit(VIRTIO_IOMMU_F_PIN_PAGE) | bit(VIRTIO_IOMMU_F_PIN_DIRTY) : 0n);
    this.#remapping = new RemappingRequests(options.tracker.remapping, options.assigned);
    this.#reports = new FaultReports(options.memory, options.assigned);
    this.#resetConfig(1);
  }

  /** Requests and event buffers that were malformed: what a correct driver never sends. */
  get badRequests(): number {
    return this.#badRequests + this.#reports.badBuffers;
  }

  accepts(features: bigint): boolean {
    // abi.md section 3: "A driver that accepts 16 without 3 or 6 gets no FEATURES_OK."
    const bypass = has(features, VIRTIO_IOMMU_F_BYPASS) || has(features, VIRTIO_IOMMU_F_BYPASS_CONFIG);
    const pinPage = has(features, VIRTIO_IOMMU_F_PIN_PAGE);
    return pinPage ? bypass : !has(features, VIRTIO_IOMMU_F_PIN_DIRTY);
  }

  start(features: bigint): void {
    this.#negotiated = features;
  }

  reset(): void {
    this.#negotiated = 0n;
    this.reportFaults(undefined);
    const { tracker } = this.#o;
    if (tracker.active) tracker.deactivate("device-reset");
    // abi.md section 4, frozen: "as it was; nothing is unpinned".
    tracker.remapping.reset(tracker.life === "frozen");
    // Section 5.13.4: "Field bypass SHOULD NOT change on device reset, but SHOULD be restored to its initial value on
    // system reset."
    this.#resetConfig(Config.read(this.#config).bypass);
  }

  machineReset(): void {
    this.#setBypass(1);
    try {
      this.#o.tracker.machineReset();
    } catch (error) {
      if (!(error instanceof HostError)) throw error;
      this.#o.hostError(error);
    }
  }

  // --- configuration ---------------------------------------------------------------------------------------------

  configRead(offset: number, into: Uint8Array): void {
    into.set(this.#config.subarray(offset, offset + into.length));
  }

  configWrite(offset: number, from: Uint8Array): void {
    const written = this.#config.slice();
    written.set(from, offset);
    const value = Config.read(written);
    const completed = completedBy(Config, offset, from.length);
    // Section 5.13.4: bypass is 0 or 1, and writable with BYPASS_CONFIG.
    if (completed.has("bypass") && has(this.#negotiated, VIRTIO_IOMMU_F_BYPASS_CONFIG) && value.bypass <= 1)
      this.#setBypass(value.bypass);
    if (!has(this.#negotiated, VIRTIO_IOMMU_F_PIN_PAGE)) return;
    const { assignedBitmap, dttRoot, dttLevels, pinFlags } = value;
    Config.write(this.#config, { assignedBitmap, dttRoot, dttLevels, pinFlags });
    // A 64-bit field may come as two 32-bit writes, low half first. Only a whole address is acted upon: half of one
    // would name another page of the guest.
    if (completed.has("assignedBitmap")) this.#fillBitmap(assignedBitmap);
    if (completed.has("pinControl")) this.#control(value.pinControl);
  }

  #setBypass(bypass: number): void {
    Config.write(this.#config, { bypass });
    this.#o.tracker.remapping.setBypass(bypass === 1, gatesOf(this.#o.assigned));
  }

  #fillBitmap(gpa: number): boolean {
    if (gpa % 4096 || !this.#o.memory.find(gpa, ASSIGNED_BITMAP_SIZE)) return false;
    const bitmap = new Uint8Array(ASSIGNED_BITMAP_SIZE);
    for (const bdf of this.#o.assigned.keys()) bitmap[bdf >> 3]! |= 1 << (bdf & 7);
    this.#o.memory.write(gpa, bitmap);
    return true;
  }

  #control(command: number): void {
    this.#pinStatus = this.#applyControl(command);
    Config.write(this.#config, { pinControl: command, pinStatus: this.#pinStatus });
  }

  /** The new pin_status. */
  #applyControl(command: number): number {
    const { tracker } = this.#o;
    const refused = (status: number) => PIN_STATUS_REFUSED | status;
    switch (command) {
      case PIN_CONTROL_OFF:
        if (tracker.active) tracker.deactivate("pin-off");
        return PIN_STATUS_OFF;
      case PIN_CONTROL_ON: {
        if (this.#activate()) return PIN_STATUS_ON;
        // abi.md section 3: a bad root, level or bitmap "leaves the device off", also when it was on.
        if (tracker.active) tracker.deactivate("pin-off");
        return refused(VIRTIO_IOMMU_S_INVAL);
      }
      case PIN_CONTROL_PARK:
      case PIN_CONTROL_UNPARK:
        if (!tracker.active) return refused(VIRTIO_IOMMU_S_UNSUPP);
        if (command === PIN_CONTROL_PARK) tracker.park();
        else tracker.unpark();
        return tracker.parkedByGuest ? PIN_STATUS_PARKED : PIN_STATUS_ON;
      default:
        return refused(VIRTIO_IOMMU_S_INVAL);
    }
  }

  #activate(): boolean {
    const { assignedBitmap, dttRoot, dttLevels, pinFlags } = Config.read(this.#config);
    if (pinFlags & ~PIN_FLAG_COMPLETE || !this.#fillBitmap(assignedBitmap)) return false;
    const complete = (pinFlags & PIN_FLAG_COMPLETE) !== 0;
    const marksDirty = has(this.#negotiated, VIRTIO_IOMMU_F_PIN_DIRTY);
    return this.#o.tracker.activate(dttRoot, dttLevels, complete, marksDirty);
  }

  #resetConfig(bypass: number): void {
    const { tracker, pinPage } = this.#o;
    this.#pinStatus = PIN_STATUS_OFF;
    this.#config.fill(0);
    Config.write(this.#config, {
      pageSizeMask: 0xffff_ffff_ffff_f000n,
      inputStart: this.#remapping.input.start,
      inputEnd: this.#remapping.input.end,
      domainEnd: 0xffff_ffff,
      probeSize: PROBE_SIZE,
      bypass,
    });
    if (!pinPage) return;
    Config.write(this.#config, { pinBatchMax: PIN_BATCH_MAX, pinQuota: pinQuota(tracker.quota) });
  }

  /** The tracker's quota is another one now. */
  quotaChanged(): void {
    if (!this.#o.pinPage) return;
    Config.write(this.#config, { pinQuota: pinQuota(this.#o.tracker.quota) });
    this.configGeneration++;
  }

  /** Endpoints can use other addresses now than all of 52 bits. What is mapped stays. */
  setInputRange(range: InputRange): void {
    this.#remapping.input = range;
    Config.write(this.#config, { inputStart: range.start, inputEnd: range.end });
    this.configGeneration++;
  }

  // --- requests --------------------------------------------------------------------------------------------------

  kick(index: number, queue: SplitQueue): void {
    // Buffers of the event queue are looked for when there is something to report.
    if (index !== REQUEST_QUEUE) return;
    // Bounded: a driver on another CPU could refill the ring for ever.
    for (let n = 0; n < QUEUE_SIZE; n++) {
      let chain: Chain | undefined;
      try {
        chain = queue.pop();
      } catch (error) {
        if (!(error instanceof MalformedChain)) throw error;
        this.#badRequests++;
        queue.push(error.head, 0);
        continue;
      }
      if (!chain) return;
      queue.push(chain.head, this.#serve(chain));
    }
  }

  /** Tell the driver of DMA faults; without a queue it is told of none of those that are there. */
  reportFaults(queue: SplitQueue | undefined): void {
    this.#o.tracker.faults.serve((fault) => queue !== undefined && this.#reports.report(queue, fault));
  }

  /** Serve one request; returns the bytes written. Unanswerable ones return 0: no tail, or an unknown type. */
  #serve(chain: Chain): number {
    const length = lengthOf(chain.readable);
    const writable = lengthOf(chain.writable);
    if (length < ReqHead.size || writable < ReqTail.size) return this.#bad();
    const request = this.#request.subarray(0, Math.min(length, REQUEST_MAX));
    // Copied once: the guest may change it while we look at it.
    if (!this.#copyIn(chain.readable, request)) return 0;
    const { type } = ReqHead.read(request);
    switch (type) {
      case VIRTIO_IOMMU_T_PIN:
        return this.#answer(chain.writable, new Uint8Array(0), this.#pin(request, length));
      case VIRTIO_IOMMU_T_PROBE:
        return this.#probe(request, length, chain.writable, writable);
      case VIRTIO_IOMMU_T_ATTACH:
      case VIRTIO_IOMMU_T_DETACH:
      case VIRTIO_IOMMU_T_MAP:
      case VIRTIO_IOMMU_T_UNMAP:
        return this.#answer(chain.writable, new Uint8Array(0), this.#remap(type, request));
      default:
        // Section 5.13.6.2: "If a request type is not recognized, the device SHOULD NOT write the buffer and SHOULD set
        // the used length to zero."
        return this.#bad();
    }
  }

  #remap(type: number, request: Uint8Array): number {
    // Section 5.13.6.3: "When the VIRTIO_IOMMU_F_BYPASS_CONFIG is negotiated, the driver can set the
    // VIRTIO_IOMMU_ATTACH_F_BYPASS flag".
    const bypass = has(this.#negotiated, VIRTIO_IOMMU_F_BYPASS_CONFIG);
    if (type === VIRTIO_IOMMU_T_ATTACH)
      return this.#remapping.attach(request, bypass ? VIRTIO_IOMMU_ATTACH_F_BYPASS : 0);
    if (type === VIRTIO_IOMMU_T_DETACH) return this.#remapping.detach(request);
    // Sections 5.13.6.5 and 5.13.6.6: "This request is only available when VIRTIO_IOMMU_F_MAP_UNMAP has been negotiated."
    if (!has(this.#negotiated, VIRTIO_IOMMU_F_MAP_UNMAP)) return VIRTIO_IOMMU_S_UNSUPP;
    return type === VIRTIO_IOMMU_T_MAP ? this.#remapping.map(request) : this.#remapping.unmap(request);
  }

  #pin(request: Uint8Array, length: number): number {
    if (!has(this.#negotiated, VIRTIO_IOMMU_F_PIN_PAGE) || !this.#o.tracker.active)
      return VIRTIO_IOMMU_S_UNSUPP;
    if (length < ReqPin.size) return VIRTIO_IOMMU_S_INVAL;
    const { headReserved, endpoint, flags, nrRanges } = ReqPin.read(request);
    if (nrRanges === 0 || nrRanges > PIN_BATCH_MAX) return VIRTIO_IOMMU_S_INVAL;
    if (length !== ReqPin.size + nrRanges * PinRange.size) return VIRTIO_IOMMU_S_INVAL;
    if (flags !== 0 || headReserved.some((b) => b !== 0)) return VIRTIO_IOMMU_S_INVAL;
    if (!this.#isAssigned(endpoint)) return VIRTIO_IOMMU_S_NOENT;
    const ranges = Array.from({ length: nrRanges }, (_, i) =>
      PinRange.read(request, ReqPin.size + i * PinRange.size),
    );
    if (ranges.some((r) => r.nrFrames === 0 || r.reserved !== 0)) return VIRTIO_IOMMU_S_INVAL;
    return this.#o.tracker.pin(ranges, endpoint);
  }

  /** Section 5.13.6.7: properties, then the tail behind them. */
  #probe(request: Uint8Array, length: number, buffers: readonly Buffer[], writable: number): number {
    const properties = new Uint8Array(Math.min(PROBE_SIZE, writable - ReqTail.size));
    // "If the properties list is smaller than probe_size, the device SHOULD NOT write any property. It SHOULD reject the
    // request and set status to VIRTIO_IOMMU_S_INVAL." A property of type 0 ends the list.
    if (length < ReqProbe.size || properties.length < PROBE_SIZE)
      return this.#answer(buffers, properties, VIRTIO_IOMMU_S_INVAL);
    // "The device MUST ignore field reserved of a PROBE request."
    const { endpoint } = ReqProbe.read(request);
    // "If the endpoint identified by endpoint doesn't exist, then the device SHOULD reject the request and set status to
    // VIRTIO_IOMMU_S_NOENT."
    if (!this.#isAssigned(endpoint)) return this.#answer(buffers, properties, VIRTIO_IOMMU_S_NOENT);
    // The only one, also of a function behind another IOMMU: what our pinners cannot map is outside input_range.
    ProbeResvMem.write(properties, {
      type: VIRTIO_IOMMU_PROBE_T_RESV_MEM,
      length: ProbeResvMem.size - 4,
      subtype: VIRTIO_IOMMU_RESV_MEM_T_MSI,
      ...MSI_WINDOW,
    });
    return this.#answer(buffers, properties, 0);
  }

  #isAssigned(endpoint: number): boolean {
    // endpoint: segment << 16 | BDF; there is one segment.
    return endpoint <= 0xffff && this.#o.assigned.has(endpoint as Bdf);
  }

  /** Write `payload`, then the tail at the end of the payload's place. Returns the bytes written. */
  #answer(buffers: readonly Buffer[], payload: Uint8Array, status: number): number {
    const reply = new Uint8Array(payload.length + ReqTail.size);
    reply.set(payload);
    ReqTail.write(reply, { status }, payload.length);
    try {
      return scatter(this.#o.memory, buffers, reply);
    } catch (error) {
      return this.#peerMemory(error);
    }
  }

  #copyIn(buffers: readonly Buffer[], into: Uint8Array): boolean {
    let done = 0;
    try {
      for (const { gpa, length } of buffers) {
        const part = into.subarray(done, done + length);
        this.#o.memory.read(gpa, part);
        done += part.length;
      }
      return true;
    } catch (error) {
      this.#peerMemory(error);
      return false;
    }
  }

  /** A request or its answer does not lie in guest RAM. */
  #peerMemory(error: unknown): number {
    if (error instanceof DmaFault || !(error instanceof Error) || !("code" in error)) throw error;
    return this.#bad();
  }

  #bad(): number {
    this.#badRequests++;
    return 0;
  }
}
