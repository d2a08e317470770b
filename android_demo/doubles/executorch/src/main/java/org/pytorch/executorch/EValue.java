package org.pytorch.executorch;

/** ONLY TO COMPILE AGAINST, see Module. */
public class EValue {
  EValue() {}

  public static EValue from(Tensor tensor) {
    return new EValue();
  }

  public boolean isTensor() {
    return false;
  }

  public Tensor toTensor() {
    throw new IllegalStateException();
  }
}
