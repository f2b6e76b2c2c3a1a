export { random } from "../../src/base/random.ts";
