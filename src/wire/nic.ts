/**
 * Descriptors of Intel's 8254x, legacy layout: "PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's
 * Manual", sections 3.2.3 (receive) and 3.3.3 (transmit).
 */

import { isStamped, Stamp, stamp } from "./stamp.ts";
import { bytes, le16, le64, struct, u8 } from "./struct.ts";

export const ReceiveDescriptor = struct("e1000_rx_desc", 16, {
  address: le64(0),
  length: le16(8),
  checksum: le16(10),
  status: u8(12),
  errors: u8(13),
  special: le16(14),
});

export const TransmitDescriptor = struct("e1000_tx_desc", 16, {
  address: le64(0),
  length: le16(8),
  checksumOffset: u8(10),
  command: u8(11),
  status: u8(12),
  checksumStart: u8(13),
  special: le16(14),
});

/** Of both. The byte behind the status is a receive descriptor's errors, and a transmit descriptor's checksumStart. */
export const DESCRIPTOR_STATUS = 12;
export const DESCRIPTOR_SIZE = 16;

/** Section 3.2.3.1; 3.3.3.2 for transmit: "Descriptor Done". */
export const STATUS_DD = 1 << 0;
/** Receive: this descriptor has the packet's last byte. */
export const STATUS_EOP = 1 << 1;
/** Transmit: "Transmit Underrun", here for data that could not be fetched. */
export const STATUS_TU = 1 << 3;
/** Section 3.2.3.2: "RX Data Error", here for data that could not be stored. */
export const ERROR_RXE = 1 << 7;

/** Section 3.3.3.1. */
export const COMMAND_EOP = 1 << 0;
export const COMMAND_RS = 1 << 3;
export const COMMAND_DEXT = 1 << 5;

/** Section 3.3.3: of one descriptor, and of a packet. */
export const TRANSMIT_LENGTH_MAX = 16_288;

/** IEEE 802.3, section 3.2; the type is "Local Experimental Ethertype 1" of IEEE 802. */
const EthernetHeader = struct("ethernet", 14, {
  target: bytes(6)(0),
  source: bytes(6)(6),
  type: bytes(2)(12),
});
const ETHERTYPE = Uint8Array.of(0x88, 0xb5);
export const PACKET_LENGTH_MIN = EthernetHeader.size + Stamp.size;

/** Write packet `sequence` of sender `from`, as long as `into`. */
export function fillPacket(into: Uint8Array, sequence: number, from: number): void {
  EthernetHeader.write(into, { target: station(from ^ 1), source: station(from), type: ETHERTYPE });
  stamp(into.subarray(EthernetHeader.size), sequence, from);
}

/** The sequence number that `packet` claims; it is long enough. */
export const sequenceOf = (packet: Uint8Array): number => Stamp.read(packet, EthernetHeader.size).number;

/** Whether `packet` is what fillPacket() writes, every byte of it. */
export function isPacket(packet: Uint8Array, sequence: number, from: number): boolean {
  if (packet.length < PACKET_LENGTH_MIN) return false;
  const { target, source, type } = EthernetHeader.read(packet);
  const same = (a: Uint8Array, b: Uint8Array) => a.every((byte, i) => byte === b[i]);
  if (!same(target, station(from ^ 1)) || !same(source, station(from)) || !same(type, ETHERTYPE))
    return false;
  return isStamped(packet.subarray(EthernetHeader.size), sequence, from);
}

/** A locally administered address. */
const station = (number: number): Uint8Array => Uint8Array.of(2, 0, 0, 0, 0, number);
